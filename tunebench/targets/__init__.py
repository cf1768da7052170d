"""Presets of compilation targets, one module per target kind, each listing its `TARGETS`."""

from tunebench import environment, registry
from tunebench.spec import TargetPreset


def presets() -> dict[str, TargetPreset]:
    """Every preset by name."""
    return registry.load("tunebench.targets", "TARGETS", TargetPreset)


def cpu_device() -> str:
    """This machine's CPU by its maker's name and LLVM's for its kind, as one name may stand for several kinds."""
    from tvm.target import codegen

    kind = codegen.llvm_get_system_cpu()
    return f"{environment.cpu_name()} ({kind})" if kind else environment.cpu_name()
