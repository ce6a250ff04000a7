"""Prints the outcome of a run on the screen, and gives it to the loggers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from tinyq_lightning.plan import MANY_LAYERS, Plan
from tinyq_lightning.report.outcome import Outcome, log_entries
from tinyq_lightning.report.tables import comparison_table, export_table, layer_table, methods_table, speed_advice
from tinyq_lightning.table import Table, fill, screen_width

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "log_outcomes",
    "log_tables",
    "show",
    "warn",
]


def warn(trainer: Trainer, outcomes: Sequence[Outcome]) -> None:
    """Warn of a budget that was not met, and of a model whose layers are all slower than float; on rank 0."""
    for outcome in outcomes:
        for warning in outcome.warnings():
            rank_zero_warn(f"TinyQ: {outcome.name}: {warning}")


def show(trainer: Trainer, outcomes: Sequence[Outcome]) -> None:
    """Print the comparison, the layers, and the paths of the files; on rank 0."""
    if not trainer.is_global_zero:
        return
    first, width = outcomes[0], screen_width()
    if len(outcomes) == 1:
        print(f"\n{fill(f'TinyQ: {first.coverage}', width)}\n       {first.note}\n")
    else:
        print(f"\nTinyQ: {len(outcomes)} methods for {first.coverage.layers} layers, {first.note}\n")
    _print_table(comparison_table(outcomes))
    print()
    if len(outcomes) == 1:
        _print_layers(first)
    else:
        _print_table(methods_table(outcomes, group=len(first.plan) > MANY_LAYERS))
    print()
    sentences: list[str] = []
    for each in outcomes:
        coverage = str(each.coverage) if len(outcomes) > 1 else None  # of one method it is in the headline
        speed = each.speed_verdict() or speed_advice(each)
        told = filter(None, (coverage, each.calibration(), each.verdict(), speed, each.shared_file()))
        sentences += told if len(outcomes) == 1 else [f"{each.name}: {sentence}" for sentence in told]
    if sentences:
        print("\n".join(fill(sentence, width) for sentence in sentences), end="\n\n")
    if (exports := export_table(outcomes)) is not None:
        _print_table(exports)
        print()
    if first.float_path:
        print(f"float      {first.float_path}")
    paths = [each.own_path for each in outcomes if each.own_path]
    for path in paths:
        print(f"quantized  {path}")
    for export in (export for each in outcomes for export in each.exports):
        print(f"{export.format:<10} {export.path}")
    print("" if paths else "no file was written\n", end="\n" if paths else "")


def _print_layers(outcome: Outcome) -> None:
    """The layers; of many, groups of those that fared alike, or where each was measured the worst."""
    plan = outcome.plan
    many = len(plan) > MANY_LAYERS
    if many and not outcome.layers:
        _print_table(plan.as_table(group=True))
        if worst := plan.worst_note():
            print(fill(worst, screen_width()))
    else:
        _print_table(_shortened(layer_table(outcome), plan) if many else layer_table(outcome))
    for note in plan.kernel_notes():
        print(fill(note, screen_width()))


def _shortened(table: Table, plan: Plan) -> Table:
    """The layers that were decided otherwise, and those with the largest errors."""
    *layers, total = table.rows
    changed = {decision.name for decision in plan if decision.decided_by == "budget" or decision.method == "float"}
    kept = [row for row in layers if row[0] in changed][: MANY_LAYERS // 2]
    sqnr = table.header.index("SQNR dB")
    worst = sorted((row for row in layers if row[sqnr]), key=lambda row: float(row[sqnr]))
    kept += [row for row in worst if row not in kept][: MANY_LAYERS - len(kept)]
    shown = [row for row in layers if row in kept]
    rest = [f"… and {len(layers) - len(shown)} more", *[""] * (len(table.header) - 1)]
    return replace(table, rows=[*shown, rest, total])


def _print_table(table: Table) -> None:
    """Print with colours if rich is installed and this is a terminal; else as plain text."""
    text = table.text(screen_width())
    if sys.stdout.isatty():
        try:
            from rich.console import Console
        except ImportError:
            pass
        else:
            console = Console(soft_wrap=True)
            for number, part in enumerate(text.split("\n\n")):  # of a table that was too wide
                header = part.partition("─")[0].rstrip()
                console.print("\n" * bool(number) + header, style="bold", markup=False, highlight=False)
                console.print(part[len(header) + 1 :], markup=False)
            return
    print(text)


def log_outcomes(trainer: Trainer, outcomes: Sequence[Outcome], alone: bool) -> None:
    """Put the entries into every logger, ``callback_metrics`` and ``logged_metrics``, after a fit."""
    entries = log_entries(outcomes, alone)
    tensors = {name: torch.tensor(value) for name, value in entries.items()}
    trainer.callback_metrics.update(tensors)
    trainer.logged_metrics.update(tensors)
    for logger in trainer.loggers:
        logger.log_metrics(entries, step=trainer.global_step)
        logger.save()


def log_tables(trainer: Trainer, outcomes: Sequence[Outcome]) -> None:
    """Log the comparison and the layers of each outcome to loggers that take tables or text."""
    if not trainer.is_global_zero:
        return
    tables = {"tinyq/comparison": comparison_table(outcomes)}
    tables |= {f"tinyq/layers/{each.name}": layer_table(each) for each in outcomes}
    for logger in trainer.loggers:
        for name, table in tables.items():
            _log_table(logger, name, table, trainer.global_step)
        logger.save()


def _log_table(logger: Any, name: str, table: Table, step: int) -> None:
    experiment = getattr(logger, "experiment", None)
    if callable(getattr(logger, "log_table", None)):  # W&B
        logger.log_table(key=name, columns=list(table.header), data=[list(row) for row in table.rows], step=step)
    elif experiment is None:
        return
    elif callable(getattr(experiment, "add_text", None)):  # TensorBoard
        experiment.add_text(name, table.markdown(), step)
    elif callable(getattr(experiment, "log_text", None)) and getattr(logger, "run_id", None):  # MLflow
        experiment.log_text(logger.run_id, table.text(), f"{name}.txt")
