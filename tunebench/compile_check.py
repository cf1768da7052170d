"""Every kernel of a model built for a target that need not be here: which build, and what the search would try."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tvm

from tunebench import cuda_compiler, gpu_ops, lowering, templates
from tunebench.tasks import Task
from tunebench.trials import brief


@dataclass(frozen=True)
class Built:
    """One kernel built one way."""

    task: str
    how: str  # default, or a template's name
    error: str = ""


def build_all(tasks: list[Task], target: tvm.target.Target) -> Iterator[Built]:
    """Each kernel with its default schedule, then with each template that serves it, its first decisions taken."""
    with tempfile.TemporaryDirectory(prefix="tunebench-") as folder:
        if target.kind.name == "cuda":
            cuda_compiler.install(Path(folder))
        for task in tasks:
            for how, make in _ways(task, target).items():
                try:
                    _build(make(), target)
                except Exception as error:  # whatever code generation raises
                    yield Built(task.name, how, brief(error))
                else:
                    yield Built(task.name, how)


def _ways(task: Task, target: tvm.target.Target) -> dict[str, Callable[[], tvm.IRModule]]:
    ways: dict[str, Callable[[], tvm.IRModule]] = {"default": lambda: lowering.default_schedule(task.mod, target)}
    if not lowering.is_cpu(target):
        operation = gpu_ops.operation(task.mod["main"])
        for template, choices in templates.serving(operation, templates.gpu_of(target)).items():
            first = {name: values[0] for name, values in choices.items()}
            ways[template.name] = lambda template=template, first=first: tvm.IRModule(  # type: ignore[misc]
                {"main": template.build(operation, first)}
            )
    return ways


def _build(mod: tvm.IRModule, target: tvm.target.Target) -> None:
    if target.kind.name == "cuda":
        cuda_compiler.build(mod, target)
    else:
        tvm.compile(mod, target=target)
