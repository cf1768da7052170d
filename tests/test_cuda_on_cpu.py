"""CUDA templates' kernels, run on the CPU thread by thread, compute what the plain kernels do."""

from __future__ import annotations

import ctypes
import random
import shutil
from dataclasses import replace
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from template_cases import ATTENTION, EXTRAS, OTHERS, PRODUCTS
from test_cuda import OPERATIONS
from test_gpu_api import expected, plain

from tunebench.kernels import templates
from tunebench.kernels.operation import Matmul, Operation
from tunebench.kernels.templates import Gpu, Template
from tunebench.runners.bench import distance, random_inputs, too_far, written

pytest.importorskip("cuda.bindings.nvrtc")
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++")

KERNELS = {"cuda-row", "cuda-matvec", "cuda-attend-one", "cuda-attend-piece", "cuda-append", "cuda-rms-norm"}
KERNELS |= {"cuda-layer-norm"}
FORMATS = ("4-bit zero_point 64", "4-bit minimum 32", "4-bit minimum 128", "4-bit full range", "8-bit zero_point 32")
FORMATS += ("8-bit minimum 64",)
NAMES = [f"{rows}, {name}" for rows in ("one row", "few rows") for name in FORMATS]
NAMES += ["one row of floats and bias", "few rows with bias to float32", "chunk, all of them", "chunk, heads of 96"]
NAMES += ["one token, all of them", "one token, heads of 80", "one token, 12 heads a key", *OTHERS]
PLAIN = ("one row", "one row of bytes", "uneven", "sixteen rows", "one token", "a longer chunk", "append", "norm")


def operation(name: str) -> Operation:
    """Of a name, as few outputs as its templates take."""
    found = {**EXTRAS, **OPERATIONS}[name]
    return replace(found, n=64) if isinstance(found, Matmul) else found


def ways(name: str) -> list[tuple[Template[Any], dict[str, int]]]:
    """Each template with some decisions, and with no more blocks at once than the machine has cores."""
    rng = random.Random(name)
    serving = templates.serving(operation(name), Gpu("cuda", 90)).items()
    drawn = [(t, {each: rng.choice(list(values)) for each, values in choices.items()}) for t, choices in serving]
    return [(t, {**d, "splits": min(2, d["splits"])} if "splits" in d else d) for t, d in drawn if t.name in KERNELS]


CASES = {f"{name}: {template.name}": (name, template, d) for name in (*PLAIN, *NAMES) for template, d in ways(name)}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """All of them, compiled at once."""
    funcs = [template.build(operation(name), decisions) for name, template, decisions in CASES.values()]
    return cuda_on_cpu.compiled(funcs, tmp_path_factory.mktemp("cuda"))


def test_every_template_is_tried() -> None:
    assert {template.name for _, template, _ in CASES.values()} == KERNELS
    assert {*PRODUCTS, *ATTENTION, *OTHERS} == {*EXTRAS} >= {*NAMES}


@pytest.mark.parametrize("case", CASES)
def test_a_kernel_computes_what_the_plain_one_does(case: str, library: ctypes.CDLL) -> None:
    name, _, decisions = CASES[case]
    mod = plain(operation(name))
    arrays = random_inputs(mod, 90, np.random.default_rng(0))
    wanted = expected(mod, arrays)
    arrays[-1] = np.full_like(arrays[-1], np.nan)
    found = cuda_on_cpu.run(library, list(CASES).index(case), arrays)
    for i in written(mod):
        assert not too_far(*distance(found[i], wanted[i]), "float16"), decisions
