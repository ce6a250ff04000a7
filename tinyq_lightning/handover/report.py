"""What an export gives back: the file, and how what was written compares with the model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tinyq_lightning.handover.comparison import OutputError
from tinyq_lightning.table import Table, format_bytes

__all__ = [
    "ExportReport",
]


@dataclass(frozen=True)
class ExportReport:
    """One file that was written, run, and compared with the quantized model.

    Attributes:
        path: what was asked for.
        format: its format.
        files: all files that were written.
        bytes: what they take together.
        model_bytes: the tensors of the quantized model's state dict.
        max_error: the bound of the relative error; None for a format of tensors only, which is read back and is equal.
        outputs: the error of each output, the worst of all inputs that were tried; none if nothing was run.
        inputs: the shapes of the inputs that were tried.
        ms: median milliseconds of one call of what was exported, on the example; None if nothing was run.
        model_ms: the same of the quantized model in this process, the two taking turns.
        threads: of both.
        notes: what the runtime does that the model does not.
        metrics: what the user's own loop gave with what was exported in the place of ``forward``; empty if it was not
            run so.
    """

    path: str
    format: str
    files: tuple[str, ...]
    bytes: int
    model_bytes: int
    max_error: float | None = None
    outputs: tuple[OutputError, ...] = ()
    inputs: tuple[dict[str, tuple[int, ...]], ...] = ()
    ms: float | None = None
    model_ms: float | None = None
    threads: int = 1
    notes: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def relative_error(self) -> float | None:
        """Of the worst output; None if nothing was run."""
        return max((each.relative for each in self.outputs), default=None)

    @property
    def largest_error(self) -> float | None:
        """The largest absolute difference of any output; None if nothing was run."""
        return max((each.largest for each in self.outputs), default=None)

    def as_table(self) -> Table:
        """The error of each output."""
        rows = [[each.name, f"{each.largest:.2g}", f"{each.relative:.2g}"] for each in self.outputs]
        return Table(["output", "largest error", "relative error"], rows)

    def table(self) -> str:
        """The error of each output, for a screen."""
        return self.as_table().text()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        errors = {"relative_error": self.relative_error, "largest_error": self.largest_error}
        lists = {"files": list(self.files), "notes": list(self.notes)}
        inputs = [{name: list(shape) for name, shape in each.items()} for each in self.inputs]
        return asdict(self) | lists | {"inputs": inputs, "outputs": [asdict(each) for each in self.outputs]} | errors

    def summary(self) -> str:
        """One line: format, size, error and time."""
        parts = [f"{self.format}  {self.path}  {format_bytes(self.bytes)}"]
        if self.relative_error is not None:
            parts.append(f"error {self.relative_error:.2g} (bound {self.max_error:g})")
        if self.ms is not None and self.model_ms is not None:
            parts.append(f"{self.ms:.3g} ms, the model here {self.model_ms:.3g} ms")
        parts += [f"{name} {value:.6g}" for name, value in self.metrics.items()]
        return ", ".join(parts)

    def __str__(self) -> str:
        lines = [self.summary(), *(f"  beside it {os.path.basename(each)}" for each in self.files if each != self.path)]
        if self.outputs:
            threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
            lines += ["", self.table(), "", f"compared with the quantized model on {threads}, inputs of the shapes"]
            lines += ["  " + ", ".join(f"{name} {list(shape)}" for name, shape in each.items()) for each in self.inputs]
        return "\n".join([*lines, *self.notes])
