"""The registry finds what a folder of plug-ins defines, and refuses what would go wrong later."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tunebench import registry
from tunebench.devices.targets import presets
from tunebench.engines.base import OWN
from tunebench.engines.baselines import peers
from tunebench.errors import TuneBenchError
from tunebench.spec import EngineName, Scheme

HEAD = "from tunebench.spec import Scheme, WeightFormat\n"
Folder = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """Makes an importable package of the given modules and returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(**modules: str) -> str:
        name = f"plugins_{tmp_path.name}"
        for module in [key for key in sys.modules if key.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        package = tmp_path / name
        package.mkdir()
        (package / "__init__.py").touch()
        for module, source in modules.items():
            (package / f"{module}.py").write_text(HEAD + source)
        return name

    return make


def _scheme(name: str) -> str:
    return f"Scheme({name!r}, WeightFormat('float', 16, 'float16'), 'float16')"


def test_load_merges_the_tuples_of_all_modules_in_order(folder: Folder) -> None:
    package = folder(b=f"SCHEMES = ({_scheme('b0')},)", a=f"SCHEMES = ({_scheme('a1')}, {_scheme('a0')})")
    entries = registry.load(package, "SCHEMES", Scheme)
    assert list(entries) == ["a1", "a0", "b0"]
    assert entries["b0"].weight.bits == 16


def test_an_empty_folder_has_no_entries(folder: Folder) -> None:
    assert registry.load(folder(), "SCHEMES", Scheme) == {}


def test_a_duplicate_name_raises_and_says_where(folder: Folder) -> None:
    package = folder(a=f"SCHEMES = ({_scheme('same')},)", b=f"SCHEMES = ({_scheme('same')},)")
    with pytest.raises(ValueError, match=r"\.b defines 'same' a second time"):
        registry.load(package, "SCHEMES", Scheme)


def test_an_entry_of_another_kind_raises(folder: Folder) -> None:
    with pytest.raises(TypeError, match="'q4', not a Scheme"):
        registry.load(folder(a="SCHEMES = ('q4',)"), "SCHEMES", Scheme)


def test_a_module_without_the_tuple_raises(folder: Folder) -> None:
    with pytest.raises(AttributeError, match="SCHEMES"):
        registry.load(folder(a=""), "SCHEMES", Scheme)


def test_a_failed_import_raises(folder: Folder) -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        registry.load(folder(a="import no_such_library"), "SCHEMES", Scheme)


def test_pick_returns_the_entry() -> None:
    assert registry.pick({"one": 1}, "one", "number") == 1


def test_pick_names_the_nearest_match_and_the_choices() -> None:
    with pytest.raises(TuneBenchError) as caught:
        registry.pick({"llama-7b": 1, "demo": 2}, "lama-7b", "model")
    assert caught.value.message == "unknown model 'lama-7b'."
    assert caught.value.hint == "Did you mean 'llama-7b'? Choose from: demo, llama-7b."


def test_pick_guesses_nothing_when_nothing_is_near() -> None:
    with pytest.raises(TuneBenchError) as caught:
        registry.pick({"demo": 1}, "zzz", "model")
    assert caught.value.hint == "Choose from: demo."


def test_every_name_of_an_engine_is_one() -> None:
    assert set(EngineName) <= {*OWN, *peers()}
    assert {preset.api for preset in presets().values() if preset.api} <= set(OWN)
    assert [f"{name} {name!s}" for name in OWN] == [f"{name.value} {name.value}" for name in OWN]
