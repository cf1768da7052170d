"""Operations that templates can build: one schedule for each template, its decisions sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunebench.tuning.spaces import Kernel, Space, sample

if TYPE_CHECKING:
    from tvm import s_tir

    from tunebench.kernels import templates


def _matches(sch: s_tir.Schedule, kernel: Kernel) -> bool:
    from tunebench.kernels import templates

    return kernel.gpu is not None and bool(templates.serving(kernel.operation, kernel.gpu))


def _generate(sch: s_tir.Schedule, kernel: Kernel) -> list[s_tir.Schedule]:
    from tunebench.kernels import templates

    if kernel.gpu is None:
        raise ValueError("templates are for GPUs")
    return [_annotated(sch.copy(), *each) for each in templates.serving(kernel.operation, kernel.gpu).items()]


def _annotated(sch: s_tir.Schedule, template: templates.Template[Any], choices: templates.Choices) -> s_tir.Schedule:
    from tunebench.kernels.templates import DECISION, TEMPLATE

    root = sch.get_sblock("root")
    for name, values in choices.items():
        sch.annotate(root, DECISION + name, sample(sch, values))
    sch.annotate(root, TEMPLATE, template.name)
    return sch


SPACES = (Space("gpu-template", "whole kernels from templates, with their decisions", "gpu", _matches, _generate),)
