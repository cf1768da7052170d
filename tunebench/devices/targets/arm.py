"""Arm's CPUs of 64 bits, through LLVM: what is common in laptops, boards, servers and phones."""

import platform
import sys

from tunebench import environment
from tunebench.spec import TargetPreset

SYSTEM = "android" if hasattr(sys, "getandroidapilevel") else sys.platform
TRIPLES = {"darwin": "arm64-apple-macos", "linux": "aarch64-linux-gnu", "android": "aarch64-linux-android"}
PHONE = ("+v8.2a", "+dotprod", "+fullfp16")
NEWER_PHONE = ("+v9a", "+dotprod", "+fullfp16", "+bf16", "+i8mm")


def _arm(
    name: str, summary: str, system: str, cpu: str, needs: tuple[str, ...], features: tuple[str, ...] = ()
) -> TargetPreset:
    """`needs`: the instruction sets, as `environment.isa` names them, that this machine must have to run it."""
    attrs: list[tuple[str, str | tuple[str, ...]]] = [("mtriple", TRIPLES[system]), ("mcpu", cpu)]
    if features:
        attrs.append(("mattr", features))
    is_arm = platform.machine().lower() in ("aarch64", "arm64")
    here = is_arm and system == SYSTEM and environment.isa() >= set(needs)
    return TargetPreset(name, "llvm", summary, tuple(attrs), runs_here=here)


TARGETS = (
    _arm("apple-m1", "Apple M1: dotprod", "darwin", "apple-m1", ("dotprod",)),
    _arm("apple-m2", "Apple M2 and later: i8mm", "darwin", "apple-m2", ("dotprod", "i8mm", "bf16")),
    _arm("rpi4", "Raspberry Pi 4, Cortex-A72: NEON alone", "linux", "cortex-a72", ()),
    _arm("rpi5", "Raspberry Pi 5, Cortex-A76: dotprod", "linux", "cortex-a76", ("dotprod",)),
    _arm("graviton3", "AWS Graviton 3, Neoverse V1: i8mm, SVE", "linux", "neoverse-v1", ("i8mm", "bf16", "sve")),
    _arm("graviton4", "AWS Graviton 4, Neoverse V2: i8mm, SVE2", "linux", "neoverse-v2", ("i8mm", "bf16", "sve2")),
    _arm("android-v8", "phones of Armv8.2: dotprod", "android", "generic", ("dotprod", "fp16"), PHONE),
    _arm(
        "android-v9",
        "phones of Armv9: i8mm; no SVE, which many turn off",
        "android",
        "generic",
        ("i8mm", "bf16", "fp16"),
        NEWER_PHONE,
    ),
)
