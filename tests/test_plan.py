"""Plans as files: what is written is read back, and what is no plan is one clear error."""

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tunebench.errors import TuneBenchError
from tunebench.runtime import plan as plans
from tunebench.runtime.plan import Buffer, Facts, Launch, Plan, Shader, Step

PLAN = Plan(
    language="wgsl",
    facts=Facts("demo", "q4f32_1", batch=1, context=128, chunks=(16,), vocab_size=64),
    buffers=(Buffer("w", 64, "weight", (4, 4), "float32"), Buffer("logits", 256, "output")),
    shaders={"double": Shader("main", "fn main() {}", (32, 1, 1), (False, True))},
    steps={size: Step((Launch("double", (0, 1), (2, 1, 1)),), 1) for size in (1, 16)},
)


def test_a_plan_comes_back_as_it_went(tmp_path: Path) -> None:
    plans.write(PLAN, tmp_path)
    assert (tmp_path / "shaders" / "double.wgsl").read_text() == "fn main() {}"
    assert plans.read(tmp_path) == PLAN


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("version",), 99, "version 99"),
        (("format",), "onnx", "of onnx"),
        (("language",), "glsl", r"\$\.language"),
        (("facts", "batch"), 0, r"\$\.facts\.batch"),
        (("buffers", 0, "bytes"), -1, r"\$\.buffers\[0\]\.bytes"),
        (("buffers", 1, "kind"), "weights", r"\$\.buffers\[1\]\.kind"),
        (("shaders", "double", "threads"), [32, 1], r"\$\.shaders\[\.\.\.\]\.threads"),
        (("shaders", "double", "source"), "shaders/none.wgsl", "none.wgsl"),
        (("steps", "16", "launches", 0, "buffers"), [0, 2], "a launch of double"),
        (("steps", "1", "launches", 0, "shader"), "triple", "a launch of triple"),
    ],
)
def test_what_does_not_fit_is_named(place: tuple[str | int, ...], value: object, words: str, tmp_path: Path) -> None:
    plans.write(PLAN, tmp_path)
    data: Any = json.loads((tmp_path / "plan.json").read_text())
    *outer, last = place
    at = data
    for each in outer:
        at = at[each]
    at[last] = value
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(TuneBenchError, match=words) as caught:
        plans.read(tmp_path)
    assert str(tmp_path) in caught.value.message


@pytest.mark.parametrize("text", [None, "", "[]", "{"])
def test_what_is_no_plan_is_said(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    with pytest.raises(TuneBenchError, match="no plan") as caught:
        plans.read(tmp_path)
    assert "tunebench export" in caught.value.hint


def test_scratch_is_what_lies_between_kernels() -> None:
    more = replace(PLAN, buffers=(*PLAN.buffers, Buffer("between", 1000, "scratch")))
    assert more.scratch_bytes == 1256
