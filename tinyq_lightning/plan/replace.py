"""Model structure replacement: walk the modules, put quantized layers in the place of float ones.

``quantize_by_layer`` and ``Quantizer`` do it for good; ``quantized`` puts the float layers back afterwards.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

from torch import nn

from tinyq_lightning.plan.checks import refuse_root, sites_for
from tinyq_lightning.plan.heap import return_freed_memory
from tinyq_lightning.plan.make_layers import QuantizedLayers
from tinyq_lightning.plan.plan import Plan
from tinyq_lightning.plan.pretrained import refuse_save_pretrained
from tinyq_lightning.plan.resolution import WithValues, resolve
from tinyq_lightning.plan.sites import Site
from tinyq_lightning.plan.swap import Swap
from tinyq_lightning.spec import QuantizationSpec, SpecLike, as_spec

__all__ = [
    "carry_out",
    "put_in",
    "quantize_by_layer",
    "quantized",
    "warn_of_unkept",
]

Made = Callable[[nn.Module], object]
"""Is called with a quantized layer."""


def quantize_by_layer(
    model: nn.Module, spec: QuantizationSpec, with_values: WithValues = nullcontext, made: Made | None = None
) -> Plan:
    """As :func:`~tinyq_lightning.search.quantizing.quantize` without data, one layer at a time.

    Args:
        model: any module with layers of a known kind somewhere below it.
        spec: what to quantize, and how.
        with_values: gives a block in which a layer has its real weights, where they are read one layer at a time.
        made: is called with each quantized layer when it is in its place.
    """
    refuse_root(model)
    warn_of_unkept(spec, 4)
    sites = sites_for(spec, model)
    plan = carry_out(resolve(spec, model, with_values, sites=sites), sites, with_values, made)
    refuse_save_pretrained(model)
    return plan


def warn_of_unkept(spec: QuantizationSpec, stacklevel: int, calibrated: bool = False) -> None:
    """Warn of what a spec asks for that takes data, which there is none of.

    Args:
        spec: what was asked for.
        stacklevel: for :func:`warnings.warn`.
        calibrated: whether there is data to choose codes by.
    """
    if spec.budget:
        warnings.warn(
            f"{spec.origin.where('budget')}: there is no evaluation here to keep a budget by, so the methods of the "
            "spec are carried out as they are. TinyQCallback keeps it, and leaves a spec that gives its plan here too",
            stacklevel=stacklevel,
        )
    if spec.calibrate and not calibrated:
        warnings.warn(
            f"{spec.origin.where('calibrate')}: there is no data here to choose codes by, so they are chosen without. "
            "Give quantize(model, spec, calibration=[...]) inputs, or the spec to TinyQCallback",
            stacklevel=stacklevel,
        )


def carry_out(plan: Plan, sites: list[Site], with_values: WithValues = nullcontext, made: Made | None = None) -> Plan:
    """Put layers in the place of float ones as soon as they are made.

    Args:
        plan: the decisions.
        sites: the layers of the model. The list is emptied: a float weight is freed once nothing holds its site.
        with_values: gives a block in which a layer has its real weights.
        made: is called with each quantized layer when it is in its place.

    Returns:
        The plan with the SQNR of each weight.
    """
    by_name = {site.name: site for site in sites}
    sites.clear()
    sizes = {decision.name: decision.float_bytes for decision in plan}
    worth_returning = sum(sizes.values()) / 16
    layers, freed, in_cycles = QuantizedLayers(plan), 0, False
    for names in _groups(plan, by_name):
        pairs = []
        for name in names:
            site = by_name.pop(name)
            with with_values(site.module):
                layer = layers.make(site)
            if layer is not None:
                pairs.append((site, layer))
                freed += sizes[name]
                in_cycles |= site.is_parametrized
            del site
        put_in(pairs)
        layers.let_go()
        if made is not None:
            for _, layer in pairs:
                made(layer)
        if freed * (1 + in_cycles) > worth_returning or not by_name:  # the original and what was computed of it
            pairs.clear()
            if in_cycles:  # torch has the properties of a parametrized module hold that module
                gc.collect()
            return_freed_memory()
            freed, in_cycles = 0, False
    return layers.plan


def put_in(pairs: Sequence[tuple[Site, nn.Module]]) -> None:
    """All of them, or none."""
    try:
        for site, layer in pairs:
            site.put(layer)
    except BaseException:
        for site, _ in pairs:
            site.put(site.module)
        raise


def _groups(plan: Plan, sites: Mapping[str, Site]) -> list[list[str]]:
    """Names of the layers that go together, the smallest first: projections of one attention, and all of a tie.

    Those that share a weight follow the first of them.
    """
    groups: dict[str, list[str]] = {}
    firsts: dict[int, str] = {}  # by attention
    for decision in plan:
        name, attention = decision.name, sites[decision.name].attention
        first = name if attention is None else firsts.setdefault(id(attention.module), name)
        group = groups[name] = [name]
        for partner in (decision.tied_to or name, first):
            other = groups.get(partner, group)
            if other is not group:
                other += group
                groups.update(dict.fromkeys(group, other))
                group = other
    sizes = {decision.name: decision.float_bytes for decision in plan}
    distinct = {id(group): group for group in groups.values()}.values()
    return sorted(distinct, key=lambda group: sum(sizes[name] for name in group))


@contextmanager
def quantized(model: nn.Module, spec: SpecLike) -> Iterator[Plan]:
    """Quantized inside the block, and the very same float layers back after it, whatever was raised.

    Args:
        model: any module with layers of a known kind somewhere below it.
        spec: a method name, a path to YAML, a mapping, or a ``QuantizationSpec``.

    Yields:
        The plan, with the SQNR of each quantized weight.

    Raises:
        SpecError: the spec is wrong or does not fit the model.
        ModelError: the model is itself a layer, or a weight cannot be quantized.
    """
    asked = as_spec(spec)
    warn_of_unkept(asked, 4)
    with Swap(model, asked) as swap:
        yield swap.plan
