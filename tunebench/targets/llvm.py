"""CPUs, through LLVM."""

from tunebench.spec import TargetPreset

TARGETS = (
    TargetPreset("llvm", "llvm", "this machine's CPU, with every instruction it has"),
    TargetPreset("x86-64-v3", "llvm", "any x86 CPU with AVX2", (("mcpu", "x86-64-v3"),)),
    TargetPreset("x86-64-v4", "llvm", "any x86 CPU with AVX-512", (("mcpu", "x86-64-v4"),)),
)
