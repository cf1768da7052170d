"""MetaSchedule's XGBoost cost model: made, kept on disk, and asked how well it ranked."""

import io
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tvm
from tvm import s_tir
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.cost_model.xgb_model import FeatureGroup

from tunebench import durable
from tunebench.errors import TuneBenchError, one_line
from tunebench.kernels import gpu as gpu_kernels
from tunebench.kernels import templates

FEATURES = 64  # of a schedule's decisions
STORE_FEATURES = 164  # of a store in a schedule's loops, as MetaSchedule counts them
MOST_BYTES = 1 << 30
WARMUP_SAMPLES = 32  # measured candidates before its predictions count


@derived_object
class DecisionFeatures(ms.feature_extractor.PyFeatureExtractor):
    """A template's kernel by its operation's numbers and its decisions, as the schedule itself has no loops to see."""

    def extract_from(self, context: ms.TuneContext, candidates: list[ms.MeasureCandidate]) -> list[tvm.runtime.Tensor]:
        """One row of features for each candidate."""
        return [tvm.runtime.tensor(decision_features(candidate.sch)[None]) for candidate in candidates]


def decision_features(sch: s_tir.Schedule) -> np.ndarray:
    """Logarithms of an operation's numbers and of a schedule's decisions, each at a place that its name gives."""
    func = sch.mod["main"]
    operation = gpu_kernels.operation(func)
    described = operation.described() if operation else {}
    numbers = {key: value for key, value in described.items() if isinstance(value, int)}
    choice = templates.chosen(func)
    if choice:
        numbers |= {f"decision {key}": value for key, value in choice[1].items()} | {choice[0].name: 1}
    else:
        places = enumerate(sch.trace.decisions.values())
        numbers |= {f"place {i}": int(value) for i, value in places if isinstance(value, int | tvm.tirx.IntImm)}
    features = np.zeros(FEATURES, np.float32)
    for name, value in numbers.items():
        features[zlib.crc32(name.encode()) % FEATURES] += np.log2(value + 1)
    return features


def new(of_decisions: bool = False) -> ms.cost_model.XGBModel:
    """A model that has learned nothing; it sees a candidate's loops or, for templates, its decisions."""
    extractor = DecisionFeatures() if of_decisions else "per-store-feature"
    return ms.cost_model.XGBModel(extractor=extractor, num_warmup_samples=WARMUP_SAMPLES, verbose_eval=10**9)


def load(path: Path, of_decisions: bool = False) -> ms.cost_model.XGBModel:
    """A model that learned from the samples kept at `path`, if there are any. TuneBenchError where they are no good.

    What is kept is numbers alone: an array of `_row`. MetaSchedule's own files are pickled objects, which may run code.
    """
    model = new(of_decisions)
    if not os.path.lexists(path):
        return model
    try:
        rows = _read(path, FEATURES if of_decisions else STORE_FEATURES)
    except Exception as error:  # of those of NumPy's reader there are many kinds
        raise TuneBenchError(f"{path} is no good ({one_line(str(error))}): the cost model learns anew.") from None
    for group in np.unique(rows["group"]) if len(rows) else ():
        _learn(model, f"{group:016x}", rows[rows["group"] == group])
    if model.data:
        _train(model)
    return model


def learn(model: ms.cost_model.XGBModel, context: ms.TuneContext, trials: Sequence[ms.database.TuningRecord]) -> None:
    """Teach a model what trials of one kernel took."""
    results = [ms.runner.RunnerResult(record.run_secs, None) for record in trials]
    model.update(context, [record.as_measure_candidate() for record in trials], results)


def save(model: ms.cost_model.XGBModel, path: Path) -> None:
    """Keep the samples that a model learned from, whole or not at all. TuneBenchError where they cannot be written."""
    rows = [
        (int(name, 16), sample, cost, features)
        for name, group in model.data.items()
        for sample, (cost, store) in enumerate(zip(group.costs, group.features, strict=True))
        for features in store
    ]
    if rows:
        file = io.BytesIO()
        np.save(file, np.array(rows, _row(len(rows[0][3]))), allow_pickle=False)
        try:
            path.with_suffix(".tar").unlink(missing_ok=True)  # an older TuneBench's
            durable.replace(path, file.getvalue())
        except OSError as error:
            raise durable.refusal(path, error) from None


def _row(features: int) -> np.dtype[np.void]:
    """One line of a sample's features: which kernel's (its hash), which sample, and the seconds it took."""
    return np.dtype([("group", "<u8"), ("sample", "<u4"), ("cost", "<f4"), ("features", "<f4", (features,))])


def _read(path: Path, features: int) -> np.ndarray:
    """The rows of a file; a file that is not as long as it says, or of other rows, is a ValueError."""
    if path.is_symlink() or not path.is_file():
        raise ValueError("it is no file")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES >> 20} MiB")
    rows = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(rows, np.ndarray) or rows.dtype != _row(features) or rows.ndim != 1:
        raise ValueError("not the samples of such a model")
    if not (np.isfinite(rows["features"]).all() and (rows["cost"] > 0).all() and np.isfinite(rows["cost"]).all()):
        raise ValueError("samples that are no numbers")
    return np.array(rows)


def _learn(model: ms.cost_model.XGBModel, name: str, rows: np.ndarray) -> None:
    """Give a model one kernel's samples, as its `update` would."""
    _, first = np.unique(rows["sample"], return_index=True)
    order = np.argsort(rows["sample"], kind="stable")
    samples = np.split(rows["features"][order], np.searchsorted(rows["sample"][order], rows["sample"][first])[1:])
    model.data[name] = FeatureGroup(name, samples, rows["cost"][first])
    model.data_size += len(samples)


def _train(model: ms.cost_model.XGBModel) -> None:
    """Fit a model to all samples it has, as its `update` does now and then."""
    model.last_train_size = model.data_size
    features = [each for group in model.data.values() for each in group.features]
    model._train(features, np.concatenate([group.min_cost / group.costs for group in model.data.values()]))


def scores(
    model: ms.cost_model.XGBModel, context: ms.TuneContext, candidates: list[ms.MeasureCandidate]
) -> list[float] | None:
    """Predicted scores, higher is faster; None while the model is still warming up."""
    if model.booster is None or model.data_size < model.num_warmup_samples:
        return None
    return [float(score) for score in model.predict(context, candidates)]


def rank_correlation(predicted: Sequence[float], seconds: Sequence[float]) -> float | None:
    """Spearman's correlation of predicted score with measured speed, -1..1; None below 4 pairs or without spread."""
    if len(predicted) < 4 or len(set(predicted)) < 2 or len(set(seconds)) < 2:
        return None
    first = np.argsort(np.argsort(predicted)).astype(float)
    second = np.argsort(np.argsort([-value for value in seconds])).astype(float)
    return float(np.corrcoef(first, second)[0, 1])
