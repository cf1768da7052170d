"""What this machine can do for a target, and why not more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tunebench import abilities, apis, environment
from tunebench.errors import TuneBenchError
from tunebench.targets import presets


def test_this_machine_can_do_everything_for_its_own_cpu() -> None:
    found = abilities.of(presets()["llvm"])
    assert found.can == set(abilities.ACTIONS)
    assert found.words == environment.cpu_name()


def test_every_preset_says_on_what_or_why_not() -> None:
    for preset in presets().values():
        found = abilities.of(preset)
        assert found.words
        assert found.can <= set(abilities.ACTIONS)
        assert ("run" in found.can) <= ("generate" in found.can)
        assert not (preset.blocked and found.can)


def test_an_api_without_a_device_can_only_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> apis.Device:
        raise TuneBenchError(f"no {name} adapter.", "Install a driver.")

    monkeypatch.setattr(apis, "open_device", none)
    found = abilities.of(presets()["webgpu"])
    assert found == abilities.Abilities(frozenset({"generate"}), "no webgpu adapter. Install a driver.")
    assert dict(abilities.api_devices())["opencl"] == "no opencl adapter. Install a driver."


def test_what_does_not_run_here_is_built_if_it_needs_no_driver() -> None:
    away = replace(presets()["llvm"], runs_here=False, absent="elsewhere")
    assert abilities.of(away) == abilities.Abilities(frozenset({"generate", "build"}), "elsewhere")
    assert abilities.of(replace(away, device="metal")).can == {"generate"}
