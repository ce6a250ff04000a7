"""What the search for a plan within the budget decides on, and its reasons in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tinyq_lightning.layers import methods_of
from tinyq_lightning.methods import LADDER, METHODS, with_bits
from tinyq_lightning.plan import Plan, Swap
from tinyq_lightning.search import LayerError, Search, SearchedLayer, loses
from tinyq_lightning.spec import Budget

__all__ = [
    "budget_reasons",
    "searched_layers",
]


def searched_layers(
    swap: Swap, errors: Mapping[str, LayerError], too_slow: Mapping[str, frozenset[str]], budget: Budget
) -> list[SearchedLayer]:
    """What the search decides on: each layer, those that share a weight as one, named by that of the most methods.

    Args:
        swap: the layers by the method that was asked for.
        errors: of each layer by its name, where they were measured.
        too_slow: methods that are slower than float, by the name of the layer.
        budget: whose ladder bars the methods that are not on it.
    """
    decisions = {decision.name: decision for decision in swap.plan}
    ties = swap.ties()
    quantized = {name: layer for name, _, layer in swap.pairs()}
    layers: dict[str, SearchedLayer] = {}
    for name in quantized:
        group = [each for each in (name, *ties[name]) if each in quantized]
        lead = max(group, key=lambda each: len(methods_of(quantized[each])))
        if lead in layers or any(other in layers for other in group):
            continue
        extra = sum(decisions[each].float_bytes - decisions[each].bytes for each in group)
        sqnr = errors[lead].output_sqnr_db if lead in errors else {}
        method, found = quantized[lead].method, methods_of(quantized[lead])
        on_ladder = _on_ladder(budget.ladder or LADDER, found)
        barred = too_slow.get(lead, frozenset()) | (set(LADDER) - on_ladder)
        higher = [each for each in LADDER[LADDER.index(method) + 1 : -1] if each in on_ladder]
        more = {each: sum(swap.bytes_by(name, each) - swap.bytes_by(name, method) for name in group) for each in higher}
        layers[lead] = SearchedLayer(lead, method, extra, sqnr, barred, more)
    return list(layers.values())


def _on_ladder(ladder: Sequence[str], methods: Sequence[str]) -> set[str]:
    """The rungs for a layer that has these methods; one that it lacks stands for the one that its kind has instead."""
    plain = {each: with_bits("w8a32", METHODS[each].bits) for each in ladder if each != "float"}
    found = {each if each in methods else plain[each] for each in plain}
    return {each for each in found if each in methods} | ({"float"} & set(ladder))


def budget_reasons(
    budget: Budget, asked: Plan, errors: Mapping[str, LayerError], found: Search
) -> dict[str, tuple[str, str]]:
    """For each layer that was changed, its method and why, with the numbers."""
    methods = {decision.name: decision.method for decision in asked}
    effect = f"{budget.monitor} lost {found.trials[0].lost:.3g}, now {loses(found.best)}"
    reasons = {}
    for name, method in found.best.changes.items():
        error = errors.get(name)
        sqnr = error.output_sqnr_db if error else {}
        shown = [f"{sqnr[each]:.1f} dB in {each}" for each in dict.fromkeys((methods[name], method)) if each in sqnr]
        why_not = f"not measured: {error.not_measured}" if error else "not called in the first batches"
        signal = f"output SQNR {', '.join(shown)}" if shown else why_not
        reasons[name] = (method, f"budget: {signal}; {effect}")
    return reasons
