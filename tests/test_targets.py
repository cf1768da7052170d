"""Presets: each makes a target of TVM, says whether this machine runs it, and if nothing can be compiled, why."""

from __future__ import annotations

import platform
import sys

import pytest
import tvm
from conftest import cpu_target
from tvm import s_tir
from tvm.script import tirx as T

from tunebench import environment
from tunebench.devices import targets
from tunebench.errors import TuneBenchError

PRESETS = targets.presets()
IS_ARM = platform.machine().lower() in ("aarch64", "arm64")
ARM = [name for name, preset in PRESETS.items() if "mtriple" in dict(preset.attrs) and name != "hexagon"]


@T.prim_func(s_tir=True)
def double(x: T.Buffer((1024,), "float32"), out: T.Buffer((1024,), "float32")) -> None:
    for i in T.vectorized(1024):
        with T.sblock("out"):
            place = T.axis.spatial(1024, i)
            out[place] = x[place] * T.float32(2)


def assembly(name: str) -> str:
    return str(tvm.compile(s_tir.Schedule(double).mod, target=cpu_target(name)).mod.inspect_source("asm"))


@pytest.mark.parametrize("name", ARM)
def test_code_is_for_arm(name: str) -> None:
    code = assembly(name)
    assert "adrp\tx" in code
    assert "xmm" not in code


def test_code_is_for_hexagon() -> None:
    assert "allocframe(r29" in assembly("hexagon")


@pytest.mark.parametrize("name", ARM)
def test_arms_presets_run_on_arm_only(name: str) -> None:
    systems = {"apple": "darwin", "android": "android"}
    system = systems.get(name.split("-")[0], "linux")
    if not IS_ARM or sys.platform != system:
        assert not PRESETS[name].runs_here


@pytest.mark.parametrize(("name", "need"), [("x86-64-v3", "avx2"), ("x86-64-v4", "avx512f")])
def test_x86s_presets_run_where_the_cpu_has_what_they_need(name: str, need: str) -> None:
    assert PRESETS[name].runs_here == (need in environment.isa())


def test_what_cannot_be_compiled_for_says_why() -> None:
    assert not PRESETS["rocm"].runs_here
    with pytest.raises(TuneBenchError, match=r"cannot compile for target 'rocm': .*device libraries"):
        targets.to_compile("rocm")
