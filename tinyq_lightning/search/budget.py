"""The search for the plan that keeps a metric within its budget and gives up as little as it can.

Pure Python: it is given layers as names with their output SQNR for each method, tries plans as the layers
whose method changes, and calls a function that returns the metric of a plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from tinyq_lightning.methods import LADDER, METHODS
from tinyq_lightning.spec import Budget

__all__ = [
    "SIGNAL_COST",
    "Search",
    "SearchedLayer",
    "Trial",
    "evaluation_limit",
    "loses",
    "search",
]

SIGNAL_COST = 1
"""The pass that measures the layers counts as this many evaluations, although it reads only the first batches."""


# A method that improves a layer's output SQNR by less than this is skipped: the error comes from the weights.
_RUNG_DB = 1.0


Changes = Mapping[str, str]
"""Method by layer name, for the layers whose method differs from the plan that was asked for."""


@dataclass(frozen=True)
class SearchedLayer:
    """A quantized layer as the search sees it.

    Attributes:
        name: its dotted path.
        method: of the plan that was asked for.
        extra_bytes: its size as float, less its size by its method.
        sqnr_db: output SQNR in dB by method; a method that is missing counts as exact, and is tried nonetheless if it
            is the first of more bits.
        barred: methods that must not be tried: slower than float, not on the user's ladder, or not of its kind.
        more_bytes: its size by another method, less its size by its own; 0 for a method that is missing.
    """

    name: str
    method: str
    extra_bytes: int
    sqnr_db: Mapping[str, float]
    barred: frozenset[str] = frozenset()
    more_bytes: Mapping[str, int] = field(default_factory=dict)

    def rungs(self) -> list[tuple[str, float]]:
        """The methods to try, from the layer's own up, with their SQNR; ``float`` is the last unless it is barred."""
        own = LADDER.index(self.method)
        found: list[tuple[str, float]] = []
        for method in LADDER[own:-1]:
            if method in self.barred and method != self.method:
                continue
            db = self.sqnr_db.get(method, math.inf)
            db = -math.inf if math.isnan(db) else db
            unknown = method not in self.sqnr_db and METHODS[method].bits > METHODS[self.method].bits
            if not found or db >= found[-1][1] + _RUNG_DB or (unknown and found[-1][0] == self.method):
                found.append((method, db))
        return found if "float" in self.barred else [*found, ("float", math.inf)]

    def added(self, method: str) -> int:
        """The bytes that the layer takes more by a method than by its own."""
        return self.extra_bytes if method == "float" else self.more_bytes.get(method, 0)


@dataclass(frozen=True)
class Trial:
    """One plan, measured.

    Attributes:
        changes: the layers that differ from the plan that was asked for.
        value: of the monitored metric.
        lost: how much worse than float; NaN if the metric is NaN.
        extra_bytes: the plan's size, less the size of the plan that was asked for.
    """

    changes: Changes
    value: float
    lost: float
    extra_bytes: int


def loses(trial: Trial) -> str:
    """What a plan loses, in words."""
    return f"loses {trial.lost:.3g}" if not trial.lost <= 0 else "loses nothing"


@dataclass(frozen=True)
class Search:
    """The plans that a search measured, and the one it chose.

    Attributes:
        trials: in the order of their measurement; the first is the plan that was asked for.
        chosen: the index of the chosen trial.
        allowed: the loss that the budget allows, in the metric's unit.
        stopped_by: ``max_evals`` or ``max_seconds`` if that ended the search early, else None.
    """

    trials: tuple[Trial, ...]
    chosen: int
    allowed: float
    stopped_by: str | None

    @property
    def best(self) -> Trial:
        """The chosen trial."""
        return self.trials[self.chosen]

    @property
    def met(self) -> bool:
        """Whether the chosen plan is within the budget."""
        return self.best.lost <= self.allowed


def evaluation_limit(layers: int) -> int:
    """The most evaluations that a run with a budget takes: ``2 + 2·log₂(layers) + 4``, rounded down.

    They include the float model, the plan that was asked for, and the pass over the first batches that
    measures the layers.
    """
    return int(2 + 2 * math.log2(max(1, layers)) + 4)


def search(
    layers: Sequence[SearchedLayer],
    budget: Budget,
    float_value: float,
    value: float,
    measure: Callable[[Changes], float],
    out_of_time: Callable[[], bool] = lambda: False,
) -> Search:
    """Find a plan within the budget that gives up as little as possible.

    Each layer can move up the ladder: w4a8 → w4a16 → w4a32 → w8a8 → w8a16 → w8a32 → float, past methods that
    improve its output by less than a decibel. The steps of all layers are sorted by the output SQNR of the method
    they leave, the smallest first; where there are layers of four bits, by the error that a step removes for each
    byte that it adds, so that those that add none come first. Bisection finds the least number of steps, from the
    beginning, with which the metric is within the budget. Then those of them that are needed are found by bisection
    too, one after the other, and the layers of the others are moved down again. At least one layer stays quantized;
    if no such plan is within the budget, the one that loses least is chosen.

    The float model and the plan that was asked for have been measured before; with these and the pass that
    measured the layers, there are at most :func:`evaluation_limit` evaluations. The same values give the
    same plan.

    Args:
        layers: those that the plan that was asked for quantizes, in the model's order.
        budget: with its ``mode``.
        float_value: the float model's metric.
        value: the metric of the plan that was asked for.
        measure: returns the metric of a plan.
        out_of_time: returns True if no further measurement may begin.
    """
    return _Searcher(layers, budget, float_value, measure, out_of_time).run(value)


class _StopError(Exception):
    """No further measurement may begin."""

    def __init__(self, reason: str | None) -> None:
        self.reason = reason


class _Searcher:
    def __init__(
        self,
        layers: Sequence[SearchedLayer],
        budget: Budget,
        float_value: float,
        measure: Callable[[Changes], float],
        out_of_time: Callable[[], bool],
    ) -> None:
        self._budget, self._float_value = budget, float_value
        self._measure, self._out_of_time = measure, out_of_time
        self._allowed = budget.allowed(float_value)
        self._rungs = [layer.rungs() for layer in layers]
        self._layers = layers
        self._limit = evaluation_limit(len(layers)) - SIGNAL_COST - 1  # the float model's evaluation
        self._trials: list[Trial] = []
        self._stopped_by: str | None = None

    def run(self, value: float) -> Search:
        self._note({}, value)
        if not self._within(0):
            try:
                if steps := self._bisect():
                    self._let_down(steps)
            except _StopError as stop:
                self._stopped_by = stop.reason
        return Search(tuple(self._trials), self._best(), self._allowed, self._stopped_by)

    def _bisect(self) -> list[int] | None:
        """The fewest steps within the budget, each as the layer that it moves; None if there are none."""
        steps = self._order()
        fewest = self._fewest(lambda count: self._climbed(steps[:count]), len(steps) + 1)
        return steps[:fewest] if fewest <= len(steps) else None

    def _fewest(self, levels: Callable[[int], list[int]], passes: int) -> int:
        """The least count whose levels are within the budget; none is too few, and ``passes`` is taken to be enough."""
        fails = 0
        while passes - fails > 1:
            middle = (fails + passes) // 2
            if self._try(levels(middle)):
                passes = middle
            else:
                fails = middle
        return passes

    def _order(self) -> list[int]:
        """The layers in the order of their steps, each as often as it has steps."""
        steps = []
        for index, rungs in enumerate(self._rungs):
            worst = -math.inf  # the steps of a layer keep their order
            for at in range(len(rungs) - 1):
                worst = max(worst, rungs[at][1] + self._bytes_db(index, at))
                steps.append((worst, index, at))
        order = [index for _, index, _ in sorted(steps)]
        # with the last step no layer would be quantized
        return order[:-1] if all(rungs[-1][0] == "float" for rungs in self._rungs) else order

    def _bytes_db(self, index: int, at: int) -> float:
        """The bytes that a step adds, in dB; 0 where all layers have eight bits and no step below float adds any."""
        if all(METHODS[layer.method].bits == 8 for layer in self._layers):
            return 0
        layer, rungs = self._layers[index], self._rungs[index]
        return 10 * math.log10(max(1, layer.added(rungs[at + 1][0]) - layer.added(rungs[at][0])))

    def _climbed(self, steps: Sequence[int]) -> list[int]:
        return [steps.count(index) for index in range(len(self._layers))]

    def _also_climbed(self, steps: Sequence[int], needed: Sequence[int], count: int) -> list[int]:
        return [max(pair) for pair in zip(self._climbed(steps[:count]), needed, strict=True)]

    def _let_down(self, steps: list[int]) -> None:
        """Find which of the steps are needed, the last first; each costs the logarithm of those that are in question.

        The last is needed, because without it the budget is exceeded. With the needed ones alone the budget may be
        met; else the fewest of the others, from the beginning, are sought that are enough with them, and the last of
        these is needed too.
        """
        needed = [0] * len(self._layers)
        while steps:
            needed[steps[-1]] = max(needed[steps[-1]], steps.count(steps[-1]))
            steps = steps[:-1]
            if self._try(needed):
                return
            steps = steps[: self._fewest(partial(self._also_climbed, steps, needed), len(steps))]

    def _try(self, levels: Sequence[int]) -> bool:
        """Whether a plan is within the budget; a plan that was measured before is not measured again."""
        changes = dict(self._changes(levels))
        known = next((trial for trial in self._trials if trial.changes == changes), None)
        if known is not None:
            return known.lost <= self._allowed
        made = len(self._trials) - 1
        if self._budget.max_evals is not None and made >= self._budget.max_evals:
            raise _StopError("max_evals")
        if self._out_of_time():
            raise _StopError("max_seconds")
        if len(self._trials) >= self._limit:
            raise _StopError(None)
        self._note(changes, self._measure(changes))
        return self._within(-1)

    def _note(self, changes: Changes, value: float) -> None:
        extra = sum(layer.added(changes[layer.name]) for layer in self._layers if layer.name in changes)
        self._trials.append(Trial(changes, value, self._budget.lost(self._float_value, value), extra))

    def _changes(self, levels: Sequence[int]) -> Iterator[tuple[str, str]]:
        for layer, rungs, level in zip(self._layers, self._rungs, levels, strict=True):
            if level:
                yield layer.name, rungs[level][0]

    def _within(self, index: int) -> bool:
        return self._trials[index].lost <= self._allowed

    def _best(self) -> int:
        """Within the budget: the fewest bytes, then the fewest changes, then the latest. Else the least loss."""

        def cost(index: int) -> tuple[float, ...]:
            trial = self._trials[index]
            if trial.lost <= self._allowed:
                return 0, trial.extra_bytes, len(trial.changes), -index
            return 1, math.inf if math.isnan(trial.lost) else trial.lost, trial.extra_bytes, index

        return min(range(len(self._trials)), key=cost)
