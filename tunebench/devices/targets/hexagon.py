"""Qualcomm's Hexagon DSPs, through LLVM: TVM 0.27's own target kind `hexagon` makes code for the host."""

from tunebench.spec import TargetPreset

TARGETS = (
    TargetPreset(
        "hexagon",
        "llvm",
        "Qualcomm's Hexagon v73, compiled for only: to link and run takes its maker's SDK",
        (("mtriple", "hexagon-unknown-elf"), ("mcpu", "hexagonv73"), ("mattr", ("+hvxv73", "+hvx-length128b"))),
        runs_here=False,
    ),
)
