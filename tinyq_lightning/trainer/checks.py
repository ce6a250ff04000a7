"""Checks before training starts, and of the metric that a budget names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden

from tinyq_lightning.errors import EvaluationError, SpecError
from tinyq_lightning.spec import Budget, Mode, QuantizationSpec, nearest

__all__ = [
    "check_monitor",
    "checkpoint_callbacks",
    "known_mode",
    "refuse_without_validation",
    "why_never_validated",
]


def why_never_validated(trainer: Trainer, module: LightningModule) -> str | None:
    """As :func:`why_no_validation`, for use before the dataloaders exist."""
    if not is_overridden("validation_step", module):
        return f"{type(module).__name__} has no validation_step"
    if trainer.limit_val_batches == 0:
        return "limit_val_batches is 0"
    return None


def refuse_without_validation(spec: QuantizationSpec, why_not: str | None) -> None:
    """Refuse a spec that needs the validation loop if that cannot be run.

    Args:
        spec: what the user asked for.
        why_not: why the validation loop cannot be run, or None.

    Raises:
        EvaluationError: ``why_not`` is given, and the spec has a budget or ``never_slower``.
    """
    if spec.budget and why_not:
        raise EvaluationError(f"the budget's metric {spec.budget.monitor!r} cannot be measured: {why_not}")
    if spec.never_slower and why_not:
        raise EvaluationError(f"never_slower times layers at the row counts of the validation loop, but {why_not}")


def known_mode(
    budget: Budget, names: Mapping[str, object], higher_is_better: Mapping[str, bool], advice: str = ""
) -> Budget:
    """The budget with its mode, which the logged metric decides unless the spec gives it.

    Args:
        budget: as the spec has it.
        names: the logged metrics by name.
        higher_is_better: by name, for metrics logged as torchmetrics objects that know it.
        advice: appended to the error about a metric that was not logged.

    Raises:
        SpecError: the metric was not logged, or its mode is unknown.
    """
    monitor = budget.monitor
    if monitor not in names:
        logged = ", ".join(sorted(name for name in names if not name.startswith("tinyq/"))) or "nothing"
        raise SpecError(
            f"budget: validation logs no metric {monitor!r}.{nearest(monitor, names)} It logs: {logged}{advice}"
        )
    if budget.mode is not None:
        return budget
    if monitor not in higher_is_better:
        raise SpecError(
            f"budget: mode is needed, since {monitor!r} is not logged as a torchmetrics object that tells it: "
            "mode='max' where higher is better, mode='min' where lower is"
        )
    mode: Mode = "max" if higher_is_better[monitor] else "min"
    return replace(budget, mode=mode)


def check_monitor(trainer: Trainer, monitor: str | None) -> None:
    """Refuse a ``monitor`` that selects none of the ModelCheckpoints.

    Raises:
        SpecError: ModelCheckpoints monitor metrics, but none of them monitors this one.
    """
    monitored = [keeper.monitor for keeper in checkpoint_callbacks(trainer) if keeper.monitor is not None]
    if monitor is not None and monitored and monitor not in monitored:
        raise SpecError(
            f"monitor: no ModelCheckpoint monitors {monitor!r}.{nearest(monitor, monitored)} "
            f"Monitored: {', '.join(monitored)}"
        )


def checkpoint_callbacks(trainer: Trainer) -> list[ModelCheckpoint]:
    """The ModelCheckpoints of the run."""
    return [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]  # type: ignore[attr-defined]
