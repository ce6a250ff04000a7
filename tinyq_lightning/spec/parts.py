"""The parts of a spec: a rule, a budget, calibration, where to save."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from tinyq_lightning.methods import Activations

__all__ = [
    "MEASURED_BY",
    "Budget",
    "Calibrate",
    "Export",
    "Mode",
    "Rule",
    "RuleBy",
    "Save",
]

Mode = Literal["min", "max"]


RuleBy = Literal["rule", "budget", "timing"]
"""Who wrote a rule: the user; or a run, for what its budget's search or its timings decided."""


MEASURED_BY: tuple[RuleBy, ...] = ("budget", "timing")
"""What a run decides from what it measured, not from the spec."""


@dataclass(frozen=True)
class Rule:
    """A pattern and the method of the layers it covers.

    Attributes:
        match: the pattern, see :func:`~tinyq_lightning.spec.matching.pattern_matches`.
        method: ``w8a32``, ``w8a16``, ``w8a8``, ``w4a32``, ``w4a16``, ``w4a8`` or ``float``.
        reason: what the plan gives as the reason; ``rule N`` where none is given.
        decided_by: ``rule`` for one that a user wrote; ``budget`` or ``timing`` for what a run measured.
    """

    match: str
    method: str
    reason: str | None = None
    decided_by: RuleBy = "rule"


@dataclass(frozen=True)
class Budget:
    """How much a metric may lose.

    Attributes:
        monitor: name of the logged metric.
        mode: ``max`` where more is better, ``min`` where less is; None: what the logged torchmetrics
            object says of itself.
        max_drop: the loss allowed, as a number in the metric's unit or ``"1%"`` of the float value.
        max_evals: validation loops that the search may run, past those of the float model and of the
            plan as asked for; None: as many as the search ever needs.
        max_seconds: time after which the search begins no further validation loop; None: no limit.
        ladder: the methods that layers may be given, from the fewest bytes up; ``float`` unless layers are never to
            stay float. None: all methods from each layer's own up.
    """

    monitor: str
    mode: Mode | None
    max_drop: float | str
    max_evals: int | None = None
    max_seconds: float | None = None
    ladder: tuple[str, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The budget as plain data, with the keys of the YAML."""
        content = asdict(self)
        ladder = content.pop("ladder")
        return content if ladder is None else {**content, "ladder": list(ladder)}

    def allowed(self, float_value: float) -> float:
        """The loss allowed, in the metric's unit."""
        if isinstance(self.max_drop, str):
            return float(self.max_drop.rstrip(" %")) / 100 * abs(float_value)
        return self.max_drop

    def lost(self, float_value: float, value: float) -> float:
        """How much worse ``value`` is than the float model's; negative where it is better."""
        return float_value - value if self.mode == "max" else value - float_value


@dataclass(frozen=True)
class Calibrate:
    """On how much data codes are chosen.

    Attributes:
        batches: the first so many of each validation dataloader, or of the inputs that ``quantize`` is given. Every
            fourth is held out, to judge the codes by.
    """

    batches: int = 8


@dataclass(frozen=True)
class Export:
    """One export of each quantized model of a run.

    Attributes:
        to: the format, of ``methods.FORMAT_NAMES``.
        activations: ``dynamic``: rounded as they come; ``static`` or ``static-signed``: by ranges from the first
            validation batches.
        batches: of each validation dataloader, to take these ranges from.
        measure: whether the user's own loop is run once more, with what was exported in the place of ``forward``; None:
            where activations are static.
    """

    to: str
    activations: Activations = "dynamic"
    batches: int = 8
    measure: bool | None = None

    @property
    def is_static(self) -> bool:
        """Whether it needs ranges of activations."""
        return self.activations != "dynamic"

    @property
    def is_measured(self) -> bool:
        """Whether the user's loop is run on it."""
        return self.is_static if self.measure is None else self.measure

    def to_plain(self) -> str | dict[str, Any]:
        """As the YAML has it: the name of the format, if nothing else was asked for."""
        default = Export(self.to)
        other = {key: value for key, value in asdict(self).items() if value != getattr(default, key)}
        return {"to": self.to, **other} if other else self.to


@dataclass(frozen=True)
class Save:
    """Where the quantized checkpoint goes.

    Attributes:
        dirpath: folder; None: beside the float checkpoint.
        filename: name with or without ``.ckpt``; None: ``<method>-<float stem>.ckpt``.
    """

    dirpath: str | None = None
    filename: str | None = None
