"""What a validation loop tells beside its values: which way a metric is better, and how long a batch takes."""

from __future__ import annotations

import math
import time
from statistics import median
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["ValidationWatch", "directions"]


def directions(trainer: Trainer) -> dict[str, bool]:
    """Whether higher is better, for each metric that was logged as a torchmetrics object that tells.

    Args:
        trainer: in ``on_validation_end``.
    """
    results = trainer._results
    found: dict[str, bool] = {}
    if results is None:
        return found
    for result in results.values():
        higher = None if result.is_tensor else getattr(result.value, "higher_is_better", None)
        if higher is not None:
            found |= dict.fromkeys(results._forked_name(result, on_step=False), bool(higher))
    return found


class ValidationWatch(Callback):
    """Watches one validation loop.

    Attributes:
        higher_is_better: by metric, where the logged torchmetrics object tells.
    """

    def __init__(self) -> None:
        self.higher_is_better: dict[str, bool] = {}
        self._seconds: list[float] = []
        self._began = 0.0

    @property
    def seconds_per_batch(self) -> float:
        """Median over the batches; NaN where there were none."""
        return median(self._seconds) if self._seconds else math.nan

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """The clock starts once the batch is there."""
        self._began = time.perf_counter()

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """The clock stops."""
        self._seconds.append(time.perf_counter() - self._began)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The logged objects are still there."""
        self.higher_is_better = directions(trainer)
