"""What README.md and docs/ name is there: links, commands and their options, scripts, functions, folders."""

import ast
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from tunebench.cli.app import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()
COMMANDS = typer.main.get_group(app).commands


def code(page: Path) -> list[str]:
    """The lines of a page's code blocks, and its code in sentences, where they are commands of tunebench."""
    text = page.read_text()
    lines = [
        line.removeprefix("$ ") for block in re.findall(r"```\n(.*?)```", text, re.S) for line in block.split("\n")
    ]
    return [line for line in [*lines, *re.findall(r"`([^`\n]+)`", text)] if line.startswith("tunebench ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", page.read_text()) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize(("page", "line"), [(page.name, line) for page in PAGES for line in code(page)])
def test_commands_have_their_options(page: str, line: str) -> None:
    name, *given = shlex.split(line, comments=True)[1:]
    command = COMMANDS[name]
    while isinstance(command, TyperGroup) and given:
        command = command.commands[given.pop(0)]
    options = {option for param in command.params for option in (*param.opts, *param.secondary_opts)} | {"--help"}
    assert {word for word in given if word.startswith("-")} <= options


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_are_there(page: Path) -> None:
    named = set(re.findall(r"\b(?:benchmarks|tests)/\w+\.(?:py|sh)", page.read_text()))
    assert {name for name in named if not (ROOT / name).is_file()} == set()


def walks() -> list[str]:
    """The walks of the architecture page."""
    return [part for part in ARCHITECTURE.split("\n## ") if part.startswith("One ")]


def defined(path: Path) -> set[str]:
    """Functions and classes of a module, and methods as `Class.method`."""
    nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    methods = {
        f"{node.name}.{part.name}"
        for node in nodes
        if isinstance(node, ast.ClassDef)
        for part in node.body
        if isinstance(part, ast.FunctionDef)
    }
    return {node.name for node in nodes} | methods


def test_walks_name_functions_that_exist_and_each_once() -> None:
    assert len(walks()) == 2
    for walk in walks():
        named = re.findall(r"`([\w/]+\.py):([\w.]+)`", walk)
        assert len(named) > 20
        assert [each for each, count in Counter(named).items() if count > 1] == []
        assert [each for each in named if each[1] not in defined(ROOT / "tunebench" / each[0])] == []


def test_the_folder_list_is_that_of_the_tree() -> None:
    listed = {
        folder: set(re.findall(r"`(\w+)/?`", files))
        for folder, files in re.findall(r"^\| `(\w+)` \| (.*) \|$", ARCHITECTURE, re.M)
    }
    folders = [path for path in (ROOT / "tunebench").iterdir() if (path / "__init__.py").exists()]
    assert set(listed) == {path.name for path in folders}
    for folder in folders:
        parts = [path for path in folder.iterdir() if not path.name.startswith("__")]
        assert {path.stem for path in parts if path.suffix == ".py" or path.is_dir()} <= listed[folder.name]
