"""Presets of compilation targets, one module per target kind, each listing its `TARGETS`."""

from tunebench import environment, registry
from tunebench.errors import TuneBenchError
from tunebench.spec import TargetPreset


def presets() -> dict[str, TargetPreset]:
    """Every preset by name."""
    return registry.load(__name__, "TARGETS", TargetPreset)


def find(name: str) -> TargetPreset:
    """The preset of that name, or one for a GPU of TVM's list, `nvidia/...`.

    A TuneBenchError for any other name.
    """
    if name.startswith("nvidia/"):
        from tvm.target import tag

        tags = [each for each in tag.list_tags() if each.startswith("nvidia/")]
        if name not in tags:
            raise registry.unknown(name, tags, "target")
        return TargetPreset(name, "cuda", f"{name.partition('/')[2]}, compiled for only", (), "cuda", False, name)
    return registry.pick(presets(), name, "target")


def to_compile(name: str) -> TargetPreset:
    """The preset of that name; a TuneBenchError for one that nothing can be compiled for, too."""
    preset = find(name)
    if preset.blocked:
        raise TuneBenchError(f"cannot compile for target {name!r}: {preset.blocked}.", "`list targets` has the others.")
    return preset


def device_name(preset: TargetPreset) -> str:
    """What runs a preset's kernels on this machine."""
    if preset.device == "cpu":
        return cpu_device()
    return str(environment.gpus()[0]["name"])


def cpu_device() -> str:
    """This machine's CPU by its maker's name and LLVM's for its kind, as one name may stand for several kinds."""
    from tvm.target import codegen

    kind = codegen.llvm_get_system_cpu()
    return f"{environment.cpu_name()} ({kind})" if kind else environment.cpu_name()
