"""Logged metrics as numbers, before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = [
    "Results",
    "compare",
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
