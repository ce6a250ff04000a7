"""Whether metrics of two evaluations can be compared: the same data, the same names, the score that was recorded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning_utilities.core.rank_zero import rank_zero_warn

from tinyq_lightning.errors import EvaluationError
from tinyq_lightning.trainer.checks import checkpoint_callbacks
from tinyq_lightning.trainer.evaluation import Evaluation

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "best_score",
    "check_comparable",
    "recorded_score",
]


def check_comparable(trainer: Trainer, before: Evaluation, after: Evaluation) -> None:
    """Warn if a quantized model did not see the data of the float model, or did not log each of its metrics.

    Args:
        trainer: the user's.
        before: of the float model.
        after: of a quantized model, in the same loop.

    Raises:
        EvaluationError: the float model logged metrics and the quantized model none of them.
    """
    if not trainer.strategy.reduce_boolean_decision(before.digests == after.digests):
        rank_zero_warn(
            "TinyQ: float and quantized model did not see the same data: the dataloaders gave other batches when they "
            "were read again, so the difference of their metrics is not that of the models alone"
        )
    missing = [name for name in before.metrics if name not in after.metrics]
    if missing and not set(before.metrics) - set(missing):
        raise EvaluationError(
            f"the float model logged {', '.join(missing)}, and the quantized model logged none of them in the same loop"
        )
    if missing:
        rank_zero_warn(f"TinyQ: the quantized model did not log {', '.join(missing)}, which the float model logged")


def best_score(trainer: Trainer, path: str | None, metrics: Mapping[str, float]) -> tuple[str, float] | None:
    """As :func:`recorded_score`; None unless the metric is among those that were measured."""
    recorded = recorded_score(trainer, path)
    return recorded if recorded is not None and recorded[0] in metrics else None


def recorded_score(trainer: Trainer, path: str | None) -> tuple[str, float] | None:
    """What a ModelCheckpoint monitors and the score it recorded for a file; None unless that is its best checkpoint.

    It records infinity where the metric was NaN, which tells nothing.
    """
    for keeper in checkpoint_callbacks(trainer):
        score = keeper.best_model_score
        if path and keeper.best_model_path == path and keeper.monitor and score is not None and math.isfinite(score):
            return keeper.monitor, float(score)
    return None
