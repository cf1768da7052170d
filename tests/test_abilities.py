"""What this machine can do for a target, and why not more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tunebench import environment
from tunebench.devices import support
from tunebench.devices.targets import presets
from tunebench.errors import TuneBenchError
from tunebench.runtime import apis


def test_this_machine_can_do_everything_for_its_own_cpu() -> None:
    found = support.of(presets()["llvm"])
    assert found.can == set(support.ACTIONS)
    assert found.words == environment.cpu_name()


def test_every_preset_says_on_what_or_why_not() -> None:
    for preset in presets().values():
        found = support.of(preset)
        assert found.words
        assert found.can <= set(support.ACTIONS)
        assert ("run" in found.can) <= ("generate" in found.can)
        assert not (preset.blocked and found.can)


def test_an_api_without_a_device_can_only_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> apis.ApiDevice:
        raise TuneBenchError(f"no {name} adapter.", "Install a driver.")

    monkeypatch.setattr(apis, "open_device", none)
    found = support.of(presets()["webgpu"])
    assert found == support.Abilities(frozenset({"generate"}), "no webgpu adapter. Install a driver.")
    assert dict(support.api_devices())["opencl"] == "no opencl adapter. Install a driver."


def test_what_does_not_run_here_is_built_if_it_needs_no_driver() -> None:
    away = replace(presets()["llvm"], runs_here=False, absent="elsewhere")
    assert support.of(away) == support.Abilities(frozenset({"generate", "build"}), "elsewhere")
    assert support.of(replace(away, device="metal")).can == {"generate"}
