"""MetaSchedule's XGBoost cost model: made, kept on disk, and asked how well it ranked."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tvm.s_tir import meta_schedule as ms

WARMUP_SAMPLES = 32  # measured candidates before its predictions count


@contextmanager
def _quiet() -> Iterator[None]:
    """Without XGBoost's remarks on the file name that MetaSchedule chose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def load(path: Path) -> ms.cost_model.XGBModel:
    """The model kept at `path`, or a new one."""
    model = ms.cost_model.XGBModel(num_warmup_samples=WARMUP_SAMPLES, verbose_eval=10**9)
    if path.exists():
        with _quiet():
            model.load(str(path))
    return model


def save(model: ms.cost_model.XGBModel, path: Path) -> None:
    """Keep the model with the samples it learned from, whole or not at all; nothing where it has learned nothing."""
    if model.booster is None:
        return
    fresh = path.with_name(f"new-{path.name}")
    with _quiet():
        model.save(str(fresh))
    fresh.replace(path)


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
