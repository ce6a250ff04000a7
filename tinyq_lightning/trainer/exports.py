"""Exports of a run, written on rank 0 beside the quantized checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from lightning_utilities.core.rank_zero import rank_zero_info

from tinyq_lightning.errors import EvaluationError, ExportError
from tinyq_lightning.handover import ExportReport, export_beside, recorded_calls, session_forward
from tinyq_lightning.plan import Plan
from tinyq_lightning.spec import QuantizationSpec
from tinyq_lightning.trainer.calibrating import validation_data_in_test
from tinyq_lightning.trainer.evaluation import run_evaluation, why_no_validation
from tinyq_lightning.trainer.failures import Failing, step_after_run
from tinyq_lightning.trainer.inner_trainer import Stage
from tinyq_lightning.trainer.ranks import write_on_rank_zero

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = [
    "export_beside_file",
]


class _Exporting(Failing, Protocol):
    """What asks for exports, and the first batch that it has seen."""

    spec: QuantizationSpec
    first_batch: Any


def export_beside_file(
    owner: _Exporting, trainer: Trainer, module: LightningModule, plan: Plan, quantized_path: str
) -> tuple[ExportReport, ...]:
    """Write the exports that the owner's spec asks for; each may fail alone, with a warning.

    Args:
        owner: its ``error`` is set if one fails.
        trainer: the user's.
        module: with the quantized layers in it.
        plan: what was quantized; nothing is exported where every layer stays float.
        quantized_path: of the checkpoint, which is written already.

    Returns:
        The reports on rank 0; nothing on other ranks.
    """
    if owner.spec.export and plan.is_float:
        rank_zero_info("TinyQ: nothing was exported, since all layers stay float")
        return ()
    reports: list[ExportReport] = []
    for asked in owner.spec.export:
        made: ExportReport | None = None
        with step_after_run(owner, trainer, f"Exporting to {asked.to}"):
            calls = _validation_calls(trainer, module, asked.batches) if asked.is_static else []
            batch = owner.first_batch
            export = partial(export_beside, module, quantized_path, asked.to, batch, asked.activations, calls)
            made = write_on_rank_zero(trainer, export)
        if made is not None and asked.is_measured and trainer.world_size > 1:
            note = "not measured by the user's own loop, since the run has several processes"
            made = replace(made, notes=(*made.notes, note))
        elif made is not None and asked.is_measured:
            with step_after_run(owner, trainer, f"Measuring the export to {asked.to}"):
                made = _measured(trainer, module, made)
        if made is not None:
            reports.append(made)
    return tuple(reports)


def _validation_calls(trainer: Trainer, module: LightningModule, batches: int) -> list[Any]:
    """What the first batches of the validation loop call ``forward`` with.

    Raises:
        EvaluationError: there is no validation data, or the loop failed.
        ExportError: it does not call ``forward``.
    """
    calls: list[Any] = []

    @contextmanager
    def noted() -> Iterator[None]:
        with recorded_calls(module) as found:
            yield
        calls.extend(found)

    in_test = trainer.state.fn == "test"
    needs = "static activations take their ranges from"
    if not in_test and (why := why_no_validation(trainer, module)):
        raise EvaluationError(f"{needs} validation data, but {why}")
    with validation_data_in_test(trainer, module, needs) if in_test else nullcontext():
        run_evaluation(trainer, module, "validate", batches, swap=noted())
    if not calls:
        raise ExportError(
            f"validation_step of {type(module).__name__} never calls self(...), so there are no inputs to take the "
            "ranges of static activations from: call self(...) there, or export the checkpoint later with "
            "calibration=[inputs, …]"
        )
    return calls


def _measured(trainer: Trainer, module: LightningModule, report: ExportReport) -> ExportReport:
    """The report with what the user's own loop gives for the exported file."""
    stage: Stage = "test" if trainer.state.fn == "test" else "validate"
    in_place = session_forward(module, report.path, to=report.format)
    return replace(report, metrics=run_evaluation(trainer, module, stage, swap=in_place).metrics)
