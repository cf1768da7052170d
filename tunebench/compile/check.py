"""Every kernel of a model built for a target that need not be here: which build, and what the search would try."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm

from tunebench.compile import nvrtc, passes, source
from tunebench.compile.tasks import Task
from tunebench.errors import brief
from tunebench.kernels import gpu as gpu_kernels
from tunebench.kernels import templates
from tunebench.kernels.operation import Operation


@dataclass(frozen=True)
class Built:
    """One kernel built one way."""

    task: str
    how: str  # default, or a template's name
    error: str = ""


def build_all(tasks: list[Task], target: tvm.target.Target) -> Iterator[Built]:
    """Each kernel with its default schedule, then with each template that serves it, its first decisions taken."""
    with tempfile.TemporaryDirectory(prefix="tunebench-") as folder, nvrtc.compiling(Path(folder)):
        for task in tasks:
            for how, build in _ways(task, target).items():
                try:
                    build()
                except Exception as error:  # whatever code generation raises
                    yield Built(task.name, how, brief(error))
                else:
                    yield Built(task.name, how)


def _ways(task: Task, target: tvm.target.Target) -> dict[str, Callable[[], object]]:
    ways: dict[str, Callable[[], object]] = {
        "default": lambda: _build(passes.default_schedule(task.mod, target), target)
    }
    if not passes.is_cpu(target):
        operation, gpu = gpu_kernels.operation(task.mod["main"]), templates.gpu_of(target)
        for template, choices in templates.serving(operation, gpu).items():
            first = {name: values[0] for name, values in choices.items()}
            ways[template.name] = functools.partial(_build_template, template, operation, first, target)
    return ways


def _build_template(
    template: templates.Template[Any], op: Operation | None, decisions: templates.Decisions, target: tvm.target.Target
) -> None:
    if template.text:
        template.text(op, decisions, templates.gpu_of(target))
    elif template.build:
        _build(tvm.IRModule({"main": template.build(op, decisions)}), target)


def _build(mod: tvm.IRModule, target: tvm.target.Target) -> None:
    if target.kind.name == "cuda":
        nvrtc.build(mod, target)
    elif target.kind.name in source.LANGUAGES:
        source.program(mod, target)
    else:
        tvm.compile(mod, target=target)
