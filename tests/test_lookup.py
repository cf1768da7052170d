"""What a database holds for a model: chunks, records of other contexts, and what it lacks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tvm
from conftest import cpu_target, draw_records, load_model, lower, relative_error

from tunebench.compile import passes
from tunebench.compile.tasks import Task, family_key, over_cache, replay
from tunebench.kernels import templates
from tunebench.kernels.operation import Append, Attention, OverCache
from tunebench.kernels.templates import Gpu
from tunebench.model import quantization
from tunebench.runners.base import Outcome, Timed, Wrong
from tunebench.runners.bench import random_inputs
from tunebench.runners.replay import DEFAULT, ReplayRunner
from tunebench.spec import Workload
from tunebench.tuning.database import Database, Entry, Provenance
from tunebench.tuning.lookup import Found, _one_of_each_layer, checked, look_up, missing_line, with_chunks
from tunebench.tuning.session import Lowered, Session

LOGS = Path(__file__).parent.parent / "tuning_logs"
H200 = tvm.target.Target({"kind": "cuda", "arch": "sm_90"})
HERE, THERE = 128, 256  # contexts
FASTER = Timed((500,) * 5)  # than the default


@dataclass
class Device:
    """What a look-up asks of a device, which measures made-up times."""

    target: tvm.target.Target
    kind: str = "cpu"
    target_name: str = "llvm"
    default_chunks: tuple[int, ...] = (16, 128)
    absent: str = ""
    engine: str = "tvm"
    cold_bytes: int = 1
    outcome: Outcome = FASTER

    def runner(self) -> ReplayRunner:
        """Its default takes 1000 ns."""
        return ReplayRunner(lambda task, program: Timed((1000,) * 5) if program == DEFAULT else self.outcome)


class Stored(Session):
    """A session with a database that is at hand."""

    def __init__(self, device: Any, database: Database) -> None:
        super().__init__(device, Path(), Path())
        object.__setattr__(self, "held", database)

    def database(self) -> Database:
        return self.held  # type: ignore[attr-defined, no-any-return]


class Filled(Database):
    """A database with given records and entries."""

    def __init__(self, folder: Path, entries: dict[str, Entry], records: dict[str, Any]) -> None:
        super().__init__(folder, Provenance("llvm", "this", 2, "0", "1"))
        self.entries, self._records = entries, records

    def promoted(self) -> dict[str, Any]:
        return self._records


def won(task: Task, chunks: tuple[int, ...] = ()) -> Entry:
    """The entry of a kernel that was promoted: 1000 ns by default, 400 tuned."""
    times = {"default_ns": [1000], "tuned_ns": [400]}
    return Entry(task.name, decision="promoted", reason="2.5 times", depth=40, chunks=list(chunks), **times)  # type: ignore[arg-type]


def entries_of(found: list[Task], name_chunks: bool = False) -> dict[str, Entry]:
    return {task.key: won(task, tuple(task.calls) if name_chunks else ()) for task in found}


@pytest.fixture(scope="module")
def tuned(config: Path) -> tuple[list[Task], dict[str, Any]]:
    """The tiny model's kernels over the cache at context THERE, each with a record."""
    target = cpu_target()
    found = [task for task in lower(load_model(config, "q0f32", context=THERE), target)[1] if over_cache(task.mod)]
    return found, draw_records(found, target, 3)


def lowered_here(config: Path, session: Session, **changes: Any) -> Lowered:
    model = load_model(config, "q0f32", **{"context": HERE, **changes})
    return Lowered(session, model, *lower(model, session.target))


# -- chunks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("chunks", [(16, 64), (24, 32)])
def test_a_bench_takes_the_chunks_that_were_tuned(
    chunks: tuple[int, ...], named: bool, config: Path, tmp_path: Path
) -> None:
    """A size that is none of the usual ones is known by its entries."""
    target = cpu_target()
    entries = entries_of(lower(load_model(config, "q4f16_1", chunks=chunks), target)[1], named)
    session = Stored(Device(target), Filled(tmp_path, entries, {}))
    asked = Workload(str(config), quantization.schemes()["q4f16_1"], chunks=(), context=THERE)  # another context
    usual = tuple(size for size in chunks if size != 24)
    assert with_chunks(session, asked, held=True).chunks == (chunks if named else usual)
    assert with_chunks(session, asked, held=False).chunks == (16, 128)
    assert with_chunks(session, replace(asked, chunks=(32,)), held=True).chunks == (32,)
    other = replace(asked, scheme=quantization.schemes()["q8f16_1"])
    assert with_chunks(session, other, held=True).chunks == (16, 128)


def test_chunks_fit_the_context(config: Path, tmp_path: Path) -> None:
    session = Stored(Device(cpu_target()), Filled(tmp_path, {}, {}))
    asked = Workload(str(config), quantization.schemes()["q0f32"], chunks=(), context=64)
    assert with_chunks(session, asked, held=True).chunks == (16,)


@pytest.mark.parametrize("context", [1024, 2048, 4096])
def test_a_committed_database_says_what_it_was_tuned_for(context: int) -> None:
    """Tuned for chunks of 512, it was benched in chunks of 128 by default, a factor of 55 slower."""
    folder = LOGS / "cuda-nvidia-h200"
    made = msgspec.json.decode((folder / "provenance.json").read_bytes(), type=Provenance)
    session = Stored(Device(H200, "gpu", "cuda", (16, 512)), Database(folder, made))
    asked = Workload("llama-7b", quantization.schemes()["q4f16_1"], chunks=(), context=context)
    asked = with_chunks(session, asked, held=True)
    assert asked.chunks == (16, 512)
    tasks = list(_one_of_each_layer(session, asked))
    found = look_up(tasks, session.database())
    attention = [task for task in tasks if isinstance(over_cache(task.mod), Attention)]
    assert len(attention) == 3
    assert {task.key for task in attention} <= set(found.records)  # which was tuned at 2048 alone
    assert all((task.key in found.moved) == (context != 2048) for task in attention)


# -- contexts ---------------------------------------------------------------------------------------------


def test_records_hold_at_another_context(config: Path, tuned: tuple[list[Task], Any], tmp_path: Path) -> None:
    """The same numbers as the default's, and times and a reason that say where they are from."""
    tasks, records = tuned
    session = Stored(Device(cpu_target()), Filled(tmp_path, entries_of(tasks), records))
    lowered = lowered_here(config, session)
    wanted = [task for task in lowered.tasks if over_cache(task.mod)]
    assert len(wanted) == 6  # attention and append, of a token and two chunks
    found = look_up(lowered.tasks, session.database())
    assert found.moved == {task.key: THERE for task in wanted}
    for task in wanted:
        assert found.entries[task.key].reason == f"tuned at context {THERE}: 2.5 times"
        assert found.time_ns(task, "tuned") == 400
        assert found.time_ns(task, "default") == 1000
        outputs = [run(mod, session.target) for mod in (task.mod, replay(task.mod, found.records[task.key]))]
        assert max(relative_error(b, a) for a, b in zip(*outputs, strict=True)) < 1e-5
    assert {task.key for task in found.missing(lowered.tasks)} == {t.key for t in lowered.tasks} - set(found.moved)


def run(mod: tvm.IRModule, target: tvm.target.Target) -> list[np.ndarray]:
    """What all arguments hold after a call."""
    arguments = [tvm.runtime.tensor(a) for a in random_inputs(mod, 40, np.random.default_rng(1))]
    tvm.compile(passes.realize(mod), target=target)["main"](*arguments)
    return [each.numpy() for each in arguments]


def test_the_nearest_context_counts_and_a_decision_of_its_own_more(
    config: Path, tuned: tuple[list[Task], Any], tmp_path: Path
) -> None:
    target = cpu_target()
    far = [task for task in lower(load_model(config, "q0f32", context=1024), target)[1] if over_cache(task.mod)]
    entries, records = {**entries_of(far), **entries_of(tuned[0])}, {**draw_records(far, target, 3), **tuned[1]}
    session = Stored(Device(target), Filled(tmp_path, entries, records))
    lowered = lowered_here(config, session)
    found = look_up(lowered.tasks, session.database())
    assert set(found.moved.values()) == {THERE}
    kept = next(iter(found.moved))
    entries[kept] = Entry("attention", decision="kept default", reason="searched here")
    assert kept not in look_up(lowered.tasks, session.database()).records


def test_other_batches_and_chunks_are_other_families(config: Path, tuned: tuple[list[Task], Any]) -> None:
    families = [family_key(task.mod) for task in tuned[0]]
    assert len(set(families)) == len(families) == 6
    two = lower(load_model(config, "q0f32", batch=2, context=THERE), cpu_target())[1]
    assert not {family_key(task.mod) for task in two} & set(families)


@pytest.mark.parametrize(
    ("outcome", "left", "words"),
    [
        (FASTER, True, f"tuned at context {THERE}: 2.5 times"),
        (Timed((1500,) * 5), False, f"tuned at context {THERE}, and slower than the default here"),
        (Wrong("off by 3"), False, f"tuned at context {THERE}, and not right here: off by 3"),
    ],
)
def test_a_moved_record_is_checked_where_it_is_to_run(
    outcome: Outcome, left: bool, words: str, config: Path, tuned: tuple[list[Task], Any], tmp_path: Path
) -> None:
    session = Stored(Device(cpu_target(), outcome=outcome), Filled(tmp_path, entries_of(tuned[0]), tuned[1]))
    lowered = lowered_here(config, session)
    before = look_up(lowered.tasks, session.database())
    after = checked(lowered, before)
    assert set(after.records) == set(after.moved) == (set(before.moved) if left else set())
    for key in before.moved:
        assert after.entries[key].reason == words
        assert after.entries[key].tuned_ns == ([500] * 5 if left else [])
    assert len(after.missing(lowered.tasks)) == len(lowered.tasks) - len(after.moved)


def operations(context: int) -> list[OverCache]:
    extents = [(1, m, 32, kv, dim, context, "float16") for m in (1, 16, 512) for kv in (8, 32) for dim in (64, 128)]
    return [kind(*each) for kind in (Attention, Append) for each in extents]


GPUS = [
    Gpu("cuda", 80),
    Gpu("cuda", 90),
    Gpu("webgpu", 0, 256, 32 << 10, frozenset({"pairs", "lanes32"})),
    Gpu("opencl", 0, 1024, 48 << 10, frozenset({"ptx"})),
]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: f"{gpu.kind} {gpu.arch}")
def test_no_template_decides_by_the_context(gpu: Gpu) -> None:
    """What may be chosen for one context may be for any, so that a record of one is one of the other."""
    for here, there in zip(operations(2048), operations(4096), strict=True):
        found = [{t.name: choices for t, choices in templates.serving(each, gpu).items()} for each in (here, there)]
        assert found[0] == found[1]


# -- what is missing --------------------------------------------------------------------------------------


def test_what_was_never_tuned_is_one_line_with_the_command(config: Path, tmp_path: Path) -> None:
    target = cpu_target()
    held = [task for task in lower(load_model(config, "q0f32", context=HERE), target)[1] if 32 not in task.calls]
    session = Stored(Device(target), Filled(tmp_path, entries_of(held), {}))
    lowered = lowered_here(config, session)
    found = look_up(lowered.tasks, session.database())
    missing = [task for task in lowered.tasks if task.key not in {each.key for each in held}]
    line = missing_line(lowered, found)
    assert line.startswith(f"{len(missing)} of {len(lowered.tasks)} kernels of tiny q0f32 on llvm run untuned: ")
    assert missing[0].name in line
    assert "never measured" in line
    assert f"`tunebench tune -m {config} -q q0f32 --target llvm --prompt 16,32 --context {HERE}`" in line
    assert "\n" not in line
    assert missing_line(lowered, Found({}, entries_of(lowered.tasks), {})) == ""


def test_a_chunk_with_a_kernel_that_was_never_timed_has_no_time(config: Path, tmp_path: Path) -> None:
    """Nothing is made of what is not known: with 0 for it the rest would look complete."""
    target = cpu_target()
    tasks = lower(load_model(config, "q0f32"), target)[1]
    entries = entries_of([task for task in tasks if not task.name.startswith("silu_mul") or 32 not in task.calls])
    times = Found({}, entries, {}).chunk_ns(tasks, "default")
    assert set(times) == {1, 16}
    assert times[1] == sum(1000 * task.calls.get(1, 0) for task in tasks)
