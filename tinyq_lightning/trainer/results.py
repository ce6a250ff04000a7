"""Logged metrics as numbers, before and after."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torchmetrics import MetricCollection

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "Results",
    "compare",
    "directions",
    "logged_names",
    "numbers",
]

Results = dict[str, dict[str, float]]


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Logged metrics as plain floats, ours left out."""
    plain = {
        name: value.item() if isinstance(value, Tensor) else value
        for name, value in metrics.items()
        if not name.startswith("tinyq/") and (not isinstance(value, Tensor) or value.numel() == 1)
    }
    return {name: float(value) for name, value in plain.items() if isinstance(value, int | float)}


def compare(before: Mapping[str, float], after: Mapping[str, float], label: str) -> Results:
    """``{metric: {"float": …, label: …, "delta": …}}`` for each metric that both runs logged."""
    return {
        name: {"float": before[name], label: after[name], "delta": _difference(after[name], before[name])}
        for name in before
        if name in after
    }


def _difference(after: float, before: float) -> float:
    return 0.0 if after == before else after - before if math.isfinite(before) else math.nan


def directions(trainer: Trainer) -> dict[str, bool]:
    """Whether higher is better, for each metric that was logged as a torchmetrics object that tells.

    Values of a MetricCollection, as ``log_dict(collection.compute())`` logs them, are known by the collection's names.

    Args:
        trainer: in ``on_validation_end`` or ``on_test_end``.
    """
    results = trainer._results
    found = _of_collections(trainer)
    if results is None:
        return found
    for result in results.values():
        higher = None if result.is_tensor else getattr(result.value, "higher_is_better", None)
        if higher is not None:
            found |= dict.fromkeys(results._forked_name(result, on_step=False), bool(higher))
    return found


def logged_names(trainer: Trainer) -> set[str]:
    """The names of all metrics that validation has logged, in a sanity check with several dataloaders as well.

    Args:
        trainer: in ``on_validation_end``.
    """
    names = set(trainer.callback_metrics)
    if (results := trainer._results) is not None:
        epoch = [result for result in results.values() if result.meta.on_epoch]
        names.update(name for result in epoch for name in results._forked_name(result, on_step=False))
    return names


def _of_collections(trainer: Trainer) -> dict[str, bool]:
    """By the names under which the MetricCollections of the module give the values of their metrics."""
    module = trainer.lightning_module
    collections = (
        [each for each in module.modules() if isinstance(each, MetricCollection)] if module is not None else []
    )
    known: dict[str, set[bool | None]] = defaultdict(set)
    for collection in collections:
        for name, metric in collection.items(keep_base=False, copy_state=False):
            known[name].add(metric.higher_is_better)
    return {name: True in told for name, told in known.items() if told in ({True}, {False})}
