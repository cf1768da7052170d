"""CPUs, through LLVM."""

from tunebench import environment
from tunebench.spec import TargetPreset


def _x86(level: str, summary: str, needs: str) -> TargetPreset:
    return TargetPreset(level, "llvm", summary, (("mcpu", level),), runs_here=needs in environment.isa())


TARGETS = (
    TargetPreset("llvm", "llvm", "this machine's CPU, with every instruction it has"),
    _x86("x86-64-v3", "any x86 CPU with AVX2", "avx2"),
    _x86("x86-64-v4", "any x86 CPU with AVX-512", "avx512f"),
)
