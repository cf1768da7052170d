"""Presets of compilation targets, one module per target kind, each listing its `TARGETS`."""

from tunebench import registry
from tunebench.spec import TargetPreset


def presets() -> dict[str, TargetPreset]:
    """Every preset by name."""
    return registry.load("tunebench.targets", "TARGETS", TargetPreset)
