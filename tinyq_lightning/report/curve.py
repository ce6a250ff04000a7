"""The drawing of a budget's search: what each plan lost over what it gave up, in the units of an SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tinyq_lightning.table import format_bytes

__all__ = [
    "search_curve",
]

_WIDTH, _HEIGHT = 360, 230
_LEFT, _RIGHT = 68, 348
_TOP, _BASE = 24, 190

# The margin between the axes and the first and last dot.
_MARGIN = 8

_Point = tuple[float, float, int]


def search_curve(budget: Mapping[str, Any]) -> dict[str, Any] | None:
    """Axes, limit and dots of the drawing; None if no plan has a loss that is a number.

    The horizontal axis is bytes, or layers if no plan takes more of them.

    Args:
        budget: of :func:`tinyq_lightning.report.files.report_content`.
    """
    trials: Sequence[Mapping[str, Any]] = budget["trials"]
    allowed: float = budget["allowed"]
    in_bytes = any(trial["extra_bytes"] for trial in trials)
    points: list[_Point] = [
        (trial["extra_bytes"] if in_bytes else len(trial["changes"]), trial["lost"], index)
        for index, trial in enumerate(trials)
        if trial["lost"] is not None
    ]
    if not points:
        return None
    most = max(x for x, _, _ in points) or 1
    highest = max(allowed, *(y for _, y, _ in points), 1e-12)
    low = min(0.0, *(y for _, y, _ in points))
    high = 1.08 * highest

    def across(x: float) -> float:
        return round(_LEFT + _MARGIN + (_RIGHT - _LEFT - 2 * _MARGIN) * x / most, 1)

    def down(y: float) -> float:
        return round(_TOP + (_BASE - _TOP) * (high - y) / (high - low), 1)

    frontier = _frontier(points)
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _RIGHT,
        "top": _TOP,
        "base": _BASE,
        "limit": down(allowed),
        "highest": down(highest),
        "highest_text": f"{highest:.3g}",
        "lowest_text": f"{low:.2g}".replace("-", "−"),
        "most_text": format_bytes(most) if in_bytes else f"{most:g}",
        "allowed_text": f"{allowed:.3g}",
        "x_name": "more bytes" if in_bytes else "layers changed",
        "y_name": f"{budget['monitor']} lost",
        "frontier": "L".join(f"{across(x)} {down(y)}" for x, y, _ in frontier) if len(frontier) > 1 else "",
        "dots": [
            {
                "x": across(x),
                "y": down(y),
                "kind": "chosen" if index == budget["chosen"] else "trial",
                "radius": 6 if index == budget["chosen"] else 4,
                "text": f"plan {index + 1}: lost {y:.4g}",
            }
            for x, y, index in sorted(points, key=lambda point: point[2] == budget["chosen"])  # the chosen one on top
        ],
    }


def _frontier(points: Sequence[_Point]) -> list[_Point]:
    """The plans that no other beats on both axes, from the left."""
    kept: list[_Point] = []
    for point in sorted(points):
        if point[1] < (kept[-1][1] if kept else math.inf):
            kept.append(point)
    return kept
