"""Searches begin from what won elsewhere: which database is near, and which of its records are tried on a kernel."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import tvm
from conftest import load_model, lower, write_config
from tvm import s_tir
from tvm.s_tir import meta_schedule as ms

from tunebench.errors import TuneBenchError
from tunebench.tuning.entry import Provenance
from tunebench.tuning.neighbours import Hints, candidates, choose

HERE = Provenance("cuda sm_90", "NVIDIA H200", 0, "0.27", "1")


def made(root: Path, folder: str, **changes: object) -> Path:
    """A database's folder, as far as it is looked at from afar."""
    path = root / folder
    path.mkdir(parents=True)
    (path / "provenance.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(HERE, **changes)))
    return path


def nearest(root: Path, here: Provenance = HERE, asked: str = "") -> list[str]:
    return [each.folder.name for each in choose(asked, here, "cuda", [root, root / "none"], "cuda-own")]


def test_the_most_similar_device_is_the_neighbour(tmp_path: Path) -> None:
    assert nearest(tmp_path) == []
    made(tmp_path, "cuda-a100", target="cuda sm_80", device="NVIDIA A100")
    assert nearest(tmp_path) == ["cuda-a100"]
    made(tmp_path, "cuda-h100", device="NVIDIA H100 80GB HBM3")
    assert nearest(tmp_path) == ["cuda-h100"]
    made(tmp_path, "cuda-own")
    made(tmp_path, "opencl-h200", target="opencl")
    (made(tmp_path, "cuda-broken") / "provenance.json").write_text("{")
    assert nearest(tmp_path) == ["cuda-h100"]
    assert nearest(tmp_path, asked="none") == []


def test_threads_count_before_the_name(tmp_path: Path) -> None:
    here = Provenance("llvm znver5", "AMD EPYC", 8, "0.27", "1")
    made(tmp_path, "cuda-1t", target="llvm znver5", device="AMD EPYC", threads=1)
    made(tmp_path, "cuda-4t", target="llvm znver5", device="Other", threads=4)
    assert nearest(tmp_path, here) == ["cuda-4t"]


def test_a_database_that_is_asked_for_must_be_of_the_kind(tmp_path: Path) -> None:
    other = made(tmp_path, "opencl-h200", target="opencl")
    mine = made(tmp_path, "a100", target="cuda sm_80", device="NVIDIA A100")
    assert nearest(tmp_path, asked=str(mine)) == ["a100"]
    with pytest.raises(TuneBenchError, match="is for opencl, and this is cuda sm_90"):
        nearest(tmp_path, asked=str(other))
    with pytest.raises(TuneBenchError, match="is missing"):
        nearest(tmp_path, asked=str(tmp_path))


def test_records_of_another_models_kernels_apply(target: tvm.target.Target, config: Path, tmp_path: Path) -> None:
    """Each kernel gets its own record first; else those of the same make, the most similar extents first."""
    here = {task.name: task for task in lower(load_model(config, "q0f32"), target)[1] if 1 in task.calls}
    wider = write_config(tmp_path, intermediate_size=512)
    there = {task.name: task for task in lower(load_model(wider, "q0f32"), target)[1] if 1 in task.calls}
    key = next(name for name in here if name.startswith("silu_mul"))
    records = {
        task.key: ms.database.TuningRecord(_trace(task.mod), ms.database.Workload(task.mod)) for task in here.values()
    }
    hints = Hints([records])
    assert hints.of(here[key]) == [records[here[key].key]]
    assert there[key].key not in records
    tried = hints.of(there[key])
    assert [each.workload.mod["main"].params[0].name for each in tried] == ["x"]
    found = candidates(there[key], tried)
    assert len(found) == 1
    assert "unroll" in str(found[0].sch.trace)
    assert Hints([]).of(there[key]) == []
    unknown = replace(there[key], key="other", mod=here[next(n for n in here if n.startswith("append"))].mod)
    assert all(each in records.values() for each in hints.of(unknown))


def _trace(mod: tvm.IRModule) -> s_tir.schedule.Trace:
    """A schedule that applies to any kernel with a loop."""

    sch = s_tir.Schedule(mod)
    sch.unroll(sch.get_loops(sch.get_child_blocks(sch.get_sblock("root"))[0])[-1])
    return sch.trace
