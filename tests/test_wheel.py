"""A wheel that works outside the checkout, and an sdist that builds the same one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("wheel")

ROOT = Path(__file__).parent.parent
OTHERS = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "reports", "tests", "*-work")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"  # what `python -m build` runs


def build(kind: str, folder: Path, out: Path) -> Path:
    """The sdist or wheel of a source folder, as the backend makes it, without the network."""
    subprocess.run(
        [sys.executable, "-c", BUILD.format(kind), str(out)], cwd=folder, check=True, capture_output=True, text=True
    )
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree without what builds and users leave in it."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "tree", ignore=OTHERS))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with the wheel; the dependencies are those of the tests' environment."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    Path(packages, "tests.pth").write_text("".join(f"{sysconfig.get_path(it)}\n" for it in ("purelib", "platlib")))
    offline = ["--no-index", "--no-deps", "--ignore-installed"]  # nor does it look at the tests' own TuneBench
    run(python, "-m", "pip", "install", *offline, str(wheel), cwd=folder)
    return python


def run(python: Path, *arguments: str, cwd: Path) -> str:
    """What a process prints that knows nothing of the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"COLUMNS": "200"}
    done = subprocess.run(
        [python, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_sdist_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", source, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("tunebench-*")
    again = build("wheel", unpacked, tmp_path / "wheel")
    assert zipfile.ZipFile(again).namelist() == zipfile.ZipFile(wheel).namelist()


def test_a_wheel_holds_every_file_that_is_used(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    code = [path for path in (ROOT / "tunebench").rglob("*.*") if path.is_file() and "__pycache__" not in path.parts]
    used = {path.relative_to(ROOT).as_posix() for path in code}
    for folder in ("workloads", "tuning_logs"):
        files = [path for path in (ROOT / folder).rglob("*.json") if "search" not in path.parts]
        used |= {f"tunebench/{path.relative_to(ROOT).as_posix()}" for path in files}
    assert used
    assert used <= held
    assert {name for name in held if ".dist-info/" not in name} <= used


def test_an_installed_wheel_lists_and_tunes(python: Path, tmp_path: Path) -> None:
    place = run(python, "-c", "import tunebench.installation as it; print(it.PACKAGE, it.checkout())", cwd=tmp_path)
    assert place.strip() == f"{next((python.parent.parent).rglob('site-packages')) / 'tunebench'} None"
    listed = run(python, "-m", "tunebench", "list", "models", cwd=tmp_path)
    assert [line.split()[0] for line in listed.splitlines()[1:]] == sorted(
        path.stem for path in (ROOT / "workloads").glob("*.json")
    )
    assert "this machine's CPU" in run(python, "-m", "tunebench", "list", "targets", cwd=tmp_path)
    short = ["--phase", "decode", "--prompt", "16", "--context", "64", "--depth", "16", "--no-bench"]
    tuned = run(
        python, "-m", "tunebench", "tune", "-m", "demo", "--trials", "2", "--time-limit", "5s", *short, cwd=tmp_path
    )
    assert "kernels promoted" in tuned
    assert list((tmp_path / "tunebench-work" / "tuning_logs").glob("llvm-*/provenance.json"))
    assert (tmp_path / "tunebench-work" / "reports" / "local" / "results.jsonl").exists()


def test_a_wheel_says_how_its_extras_are_installed(python: Path, tmp_path: Path) -> None:
    code = "from tunebench import installation; print(installation.install_hint('webgpu'))"
    assert run(python, "-c", code, cwd=tmp_path).strip().endswith("-m pip install 'tunebench[webgpu]'")
    offline = ["-m", "pip", "install", "--no-index", "--dry-run", "tunebench[webgpu]"]  # no index knows TuneBench
    assert "tunebench" in run(python, *offline, cwd=tmp_path)
