"""MetaSchedule's XGBoost cost model: made, kept on disk, and asked how well it ranked."""

import shutil
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tvm
from tvm import s_tir
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms

from tunebench.kernels import gpu as gpu_kernels
from tunebench.kernels import templates

FEATURES = 64  # of a schedule's decisions
WARMUP_SAMPLES = 32  # measured candidates before its predictions count


@contextmanager
def _quiet() -> Iterator[None]:
    """Without XGBoost's remarks on the file name that MetaSchedule chose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


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


def load(path: Path, of_decisions: bool = False) -> ms.cost_model.XGBModel:
    """The model kept at `path`, or a new one, which sees a candidate's loops or, for templates, its decisions."""
    extractor = DecisionFeatures() if of_decisions else "per-store-feature"
    model = ms.cost_model.XGBModel(extractor=extractor, num_warmup_samples=WARMUP_SAMPLES, verbose_eval=10**9)
    if path.exists() and _can_pack():
        with _quiet():
            model.load(str(path))
    return model


def save(model: ms.cost_model.XGBModel, path: Path) -> None:
    """Keep the model with the samples it learned from, whole or not at all; nothing where it has learned nothing."""
    if model.booster is None or not _can_pack():
        return
    fresh = path.with_name(f"new-{path.name}")
    with _quiet():
        model.save(str(fresh))
    fresh.replace(path)


def _can_pack() -> bool:
    """Whether there is the program with which MetaSchedule packs a model; a later run learns anew without."""
    return shutil.which("tar") is not None


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
