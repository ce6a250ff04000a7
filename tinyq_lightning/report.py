"""What a run has to say: tables on the screen, entries in the loggers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer

from tinyq_lightning.plan import Plan
from tinyq_lightning.table import format_bytes, format_table

__all__ = ["Outcome", "log_entries", "log_outcome"]


@dataclass(frozen=True)
class Outcome:
    """One method on one model, measured.

    Attributes:
        plan: what was quantized.
        results: ``{metric: {"float": …, label: …, "delta": …}}``.
        float_bytes: tensors of the float state dict.
        bytes: tensors of the quantized state dict.
        float_path: the float checkpoint, or None.
        quantized_path: the file, or None where none was written.
        note: where the weights come from.
    """

    plan: Plan
    results: Mapping[str, Mapping[str, float]]
    float_bytes: int
    bytes: int
    float_path: str | None
    quantized_path: str | None
    note: str

    def table(self) -> str:
        """The comparison as text for people."""
        label = self.plan.label
        rows = [
            [name, f"{values['float']:.6g}", f"{values[label]:.6g}", f"{values['delta']:+.2g}"]
            for name, values in self.results.items()
        ]
        share = self.bytes / self.float_bytes - 1 if self.float_bytes else 0.0
        rows.append(["weights", format_bytes(self.float_bytes), format_bytes(self.bytes), f"{share:+.1%}"])
        paths = (self.float_path, self.quantized_path)
        if all(path and os.path.isfile(path) for path in paths):
            on_disk = [os.path.getsize(path) for path in paths if path]
            change = f"{on_disk[1] / on_disk[0] - 1:+.1%}"
            rows.append(["file on disk", *map(format_bytes, on_disk), change])
        count = sum(decision.method != "float" for decision in self.plan)
        lines = [
            f"TinyQ: {count} of {len(self.plan)} Linear layers in int8 ({label}), {self.note}",
            "",
            format_table(["", "float", label, "delta"], rows),
            "",
        ]
        lines += [f"float      {self.float_path}"] if self.float_path else []
        lines += [f"quantized  {self.quantized_path}"] if self.quantized_path else ["no file was written (save=False)"]
        return "\n".join(lines)


def log_entries(
    label: str, results: Mapping[str, Mapping[str, float]], float_bytes: int, quantized_bytes: int
) -> dict[str, float]:
    """The entries for loggers: ``tinyq/<metric>/float``, ``…/<method>``, ``…/delta``, ``tinyq/size_mb/…``.

    Sizes are megabytes of 10⁶ bytes of the state dict's tensors.
    """
    entries = {f"tinyq/{name}/{key}": value for name, values in results.items() for key, value in values.items()}
    sizes = {"float": float_bytes, label: quantized_bytes}
    return entries | {f"tinyq/size_mb/{key}": size / 1e6 for key, size in sizes.items()}


def log_outcome(trainer: Trainer, outcome: Outcome) -> None:
    """Put the entries into every logger, ``callback_metrics`` and ``logged_metrics``, after a fit."""
    entries = log_entries(outcome.plan.label, outcome.results, outcome.float_bytes, outcome.bytes)
    tensors = {name: torch.tensor(value) for name, value in entries.items()}
    trainer.callback_metrics.update(tensors)
    trainer.logged_metrics.update(tensors)
    for logger in trainer.loggers:
        logger.log_metrics(entries, step=trainer.global_step)
        logger.save()
