"""AMD's GPUs, through ROCm."""

from tunebench.spec import TargetPreset

TARGETS = (
    TargetPreset(
        "rocm",
        "rocm",
        "AMD's GPUs; nothing here compiles for them",
        device="rocm",
        runs_here=False,
        blocked="TVM's code generator stops where AMD's device libraries are not installed, and its wheels have no "
        "runtime for ROCm",
    ),
)
