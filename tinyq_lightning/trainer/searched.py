"""What the search for a plan within the budget decides on, and its reasons in words."""

from __future__ import annotations

from collections.abc import Mapping

from tinyq_lightning.layers import methods_of
from tinyq_lightning.plan import Plan, Swap
from tinyq_lightning.search import LADDER, LayerError, Search, SearchedLayer, loses
from tinyq_lightning.spec import Budget

__all__ = [
    "budget_reasons",
    "searched_layers",
]


def searched_layers(
    swap: Swap, errors: Mapping[str, LayerError], too_slow: Mapping[str, frozenset[str]]
) -> list[SearchedLayer]:
    """What the search decides on: each layer, those that share a weight as one, named by that of the most methods.

    Args:
        swap: the layers by the method that was asked for.
        errors: of each layer by its name, where they were measured.
        too_slow: methods that are slower than float, by the name of the layer.
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
        barred = too_slow.get(lead, frozenset()) | (set(LADDER[:-1]) - set(methods_of(quantized[lead])))
        layers[lead] = SearchedLayer(lead, quantized[lead].method, extra, sqnr, barred)
    return list(layers.values())


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
