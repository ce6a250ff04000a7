"""A plan of hundreds of layers in few rows: layers whose names differ in numbers alone, and that fared alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinyq_lightning.plan.plan import Decision

__all__ = [
    "group_name",
    "grouped",
]

_NUMBER = re.compile(r"(?<![^._])\d+(?![^._])")  # A whole part of a dotted name.


def grouped(decisions: Iterable[Decision]) -> list[list[Decision]]:
    """The decisions in groups, by the place of their first: same method, reason, kind and kernel, and alike in name.

    Names are alike if they differ in parts that are numbers alone, as ``blocks.0.fc`` and ``blocks.11.fc`` do.
    """
    groups: dict[tuple[str, ...], list[Decision]] = {}
    for decision in decisions:
        kernel = decision.kernel.label if decision.kernel else ""
        alike = _NUMBER.sub("*", decision.name)
        why = decision.uncalibrated or ""
        key = (alike, decision.kind, decision.method, decision.reason, why, kernel)
        groups.setdefault(key, []).append(decision)
    return list(groups.values())


def group_name(group: Sequence[Decision]) -> str:
    """``blocks.*.fc ×12``: a star for the numbers that differ; the name itself for a group of one."""
    if len(group) == 1:
        return group[0].name
    numbers = [_NUMBER.findall(decision.name) for decision in group]
    shown = ["*" if len({*column}) > 1 else column[0] for column in zip(*numbers, strict=True)]
    text = _NUMBER.split(group[0].name)
    name = "".join(part for pair in zip_longest(text, shown, fillvalue="") for part in pair)
    return f"{name} ×{len(group)}"
