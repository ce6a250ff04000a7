"""A spec resolved against one model: spec × model → plan."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from tinyq_lightning.errors import ModelError, SpecError
from tinyq_lightning.kernels import Choice, count_non_finite
from tinyq_lightning.layers import QuantizedLayer, is_replaceable
from tinyq_lightning.methods import KernelName
from tinyq_lightning.plan.heap import return_freed_memory
from tinyq_lightning.plan.plan import DecidedBy, Decision, OtherWeight, Plan
from tinyq_lightning.plan.sites import Site, find_sites, is_metric
from tinyq_lightning.plan.ties import weights_of
from tinyq_lightning.spec import (
    MEASURED_BY,
    QuantizationSpec,
    Wanted,
    deciding_rule,
    excluding,
    nearest,
    pattern_matches,
    wanted_method,
)

__all__ = [
    "WithValues",
    "check_model",
    "check_patterns",
    "refuse_root",
    "resolve",
    "why_not_replaced",
    "why_stays_float",
]

WithValues = Callable[[nn.Module], AbstractContextManager[object]]
"""A function that gives a context manager in which a layer of a model without values has its real weights."""


def check_patterns(spec: QuantizationSpec, model: nn.Module, sites: Sequence[Site] | None = None) -> None:
    """Check the spec's patterns against the names in ``model``, without a look at any weight.

    Args:
        spec: what was asked for.
        model: any module with layers of a known kind somewhere below it.
        sites: its layers, where they have been found already.

    Raises:
        ModelError: the model has no layer of a known kind, or none that can be quantized.
        SpecError: a pattern matches nothing, a rule is shadowed by what stands before it, or nothing is
            left to quantize.
    """
    sites = find_sites(model) if sites is None else sites
    if not sites:
        kinds = Counter(type(m).__name__ for m in model.modules() if not m._modules and m._parameters)
        has = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4)) or "no layers"
        raise ModelError(f"{type(model).__name__} has no layer to quantize (it has {has})")
    on = _switched_on(spec, sites)
    for index, pattern in enumerate(spec.exclude):
        _refuse_idle_pattern(spec, pattern, spec.origin.where("exclude", index), model, sites, on)
    for index, rule in enumerate(spec.rules):
        where = spec.origin.where("rules", index, "match")
        covered = _refuse_idle_pattern(spec, rule.match, where, model, sites, on)
        if not any(deciding_rule(spec, site.names) == index for site in covered):
            by = excluding(spec, covered[0].names)
            taker = f"exclude {by!r}" if by else f"rule {(deciding_rule(spec, covered[0].names) or 0) + 1}"
            raise SpecError(
                f"{where}: rule {index + 1} ({rule.match!r}) is shadowed: all that it matches, such as "
                f"{covered[0].name!r}, is taken by {taker} before it. Move it up, narrow the other, or remove it"
            )
    if not on:
        there = ", ".join(sorted({site.kind.name for site in sites}))
        raise ModelError(
            f"{type(model).__name__} has no layer of the kinds {', '.join(spec.kinds)} to quantize (it has some of "
            f"{there})"
        )
    wanted = [wanted_method(spec, site.names) for site in on]
    left = f"all {len(on)} layers" if len(on) > 1 else "the only layer"
    if all(each.method == "float" and each.decided_by not in MEASURED_BY for each in wanted):
        raise SpecError(f"{spec.origin.where()}: this spec leaves {left} float")


def _switched_on(spec: QuantizationSpec, sites: Sequence[Site]) -> list[Site]:
    """The layers of the spec's kinds, and those that share a weight with one of them."""
    on = {site.name for site in sites if site.kind.name in spec.kinds}
    return [site for site in sites if site.name in on or not on.isdisjoint(site.tied)]


def _refuse_idle_pattern(
    spec: QuantizationSpec, pattern: str, where: str, model: nn.Module, sites: Sequence[Site], on: Sequence[Site]
) -> list[Site]:
    """The layers that a pattern matches; refuse one that matches none, or only those of kinds that are off."""
    matched = [site for site in sites if any(pattern_matches(pattern, name) for name in site.names)]
    if not matched:
        raise SpecError(f"{where}: {_no_match(pattern, model, sites)}")
    names = {site.name for site in on}
    covered = [site for site in matched if site.name in names]
    if not covered:
        kinds = ", ".join(sorted({site.kind.name for site in matched}))
        raise SpecError(
            f"{where}: pattern {pattern!r} matches only layers of a kind that is switched off ({kinds}), such as "
            f"{matched[0].name!r}: add it to kinds, or remove the pattern"
        )
    return covered


def check_model(spec: QuantizationSpec, model: nn.Module) -> None:
    """Check all that can be known of ``model`` without its weights: to be called before training.

    Raises:
        ModelError: the model is itself a layer, has none, or every layer of it would stay float.
        SpecError: as :func:`check_patterns`.
    """
    refuse_root(model)
    sites = find_sites(model)
    check_patterns(spec, model, sites)
    reasons = []
    for site in _switched_on(spec, sites):
        method, reason, decided_by = wanted_method(spec, site.names)
        if decided_by in MEASURED_BY:
            return
        left = "already quantized" if site.is_quantized else reason if method == "float" else why_stays_float(site)
        if left is None:
            return
        reasons.append(f"{site.name}: {left}")
    raise ModelError(f"there is nothing to quantize ({'; '.join(reasons)})")


def refuse_root(model: nn.Module) -> None:
    """Refuse a model that is itself a layer: no module holds it, so that no other could take its place.

    Raises:
        ModelError: it is one.
    """
    if is_replaceable(model):
        other = ", or use replace_linear_with_target_and_quantize, which returns the new layer"
        raise ModelError(
            f"the model is itself an nn.{type(model).__name__}, which cannot be replaced in place: put it in an "
            f"nn.Sequential{other if isinstance(model, nn.Linear) else ''}"
        )


def _no_match(pattern: str, model: nn.Module, sites: Sequence[Site]) -> str:
    names = [name for site in sites for name in site.names]
    leaves = {name.split(".")[-1] for name in names}
    other = next(((n, m) for n, m in model.named_modules() if n and pattern_matches(pattern, n)), None)
    below = sorted({n for n, _ in model.named_modules() if n.split(".")[-1] == pattern and "." in n})
    if other and not any(name.startswith(other[0] + ".") for name in names):
        hint = f" {other[0]!r} is there, but is never quantized: its type is {type(other[1]).__name__}."
    elif below and any(name.startswith(below[0] + ".") for name in names):
        hint = f" To cover {below[0]!r} and the like, write '*.{pattern}'."
    else:
        hint = nearest(pattern, [*names, *leaves], 3)
    shown = ", ".join(names[:6]) + (f", … ({len(names)} in all)" if len(names) > 6 else "")
    return f"pattern {pattern!r} matches no layer.{hint or ''} The layers are: {shown}"


def why_not_replaced(site: Site) -> str | None:
    """Why a layer cannot be replaced whatever the spec says; None if it can."""
    if site.why_float or site.is_lazy or site.is_quantized:
        return site.why_float
    for name, size in site.sizes.items():
        shape = site.weights_like[name].shape
        if shape != size.shape:
            return f"its {name} is {list(shape)} where its sizes tell of {list(size.shape)}"
    bias, size = getattr(site.module, "bias", None), next(iter(site.sizes.values()))
    if len(site.sizes) == 1 and isinstance(bias, Tensor) and bias.shape != (size.rows,):
        return f"its bias is {list(bias.shape)} where its sizes tell of {[size.rows]}"
    return None


def why_stays_float(site: Site) -> str | None:
    """Why a layer stays float whatever the spec says: it cannot be replaced, or a file would not shrink by it."""
    why = why_not_replaced(site)
    if why or site.is_lazy:
        return why
    sizes, itemsize = site.sizes.values(), site.dtype.itemsize
    after, before = sum(size.bytes for size in sizes), sum(size.count for size in sizes) * itemsize
    if after < before:
        return None
    if len(sizes) > 1:
        return f"int8 is no smaller: {after} bytes, {before} as float"
    rows, columns = (size := next(iter(sizes))).rows, size.count // size.rows
    return f"int8 is no smaller: {columns} + {after // rows - columns} bytes a row, {before // rows} as float"


def resolve(
    spec: QuantizationSpec,
    model: nn.Module,
    with_values: WithValues = nullcontext,
    why_float: Callable[[Site], str | None] = why_stays_float,
    sites: Sequence[Site] | None = None,
) -> Plan:
    """One decision for every layer of ``model`` that is of a known kind; nothing is changed.

    Args:
        spec: what was asked for.
        model: any module with layers of a known kind somewhere below it.
        with_values: gives a block in which a layer has its real weights, for a model that is without.
        why_float: why a layer stays float whatever the spec says; None if it need not.
        sites: the model's layers, where they have been found already.

    Raises:
        ModelError: a layer that would be quantized has no values yet or, unless the spec says
            ``non_finite: float``, values that are not finite. The message names layers and counts.
        SpecError: as :func:`check_patterns`; or the spec asks for what only a run can decide.
    """
    if spec.methods:
        raise SpecError(
            f"{spec.origin.where('method')}: a model is quantized by one method; to compare {', '.join(spec.methods)}, "
            "give the list to TinyQCallback"
        )
    if spec.never_slower:
        raise SpecError(
            f"{spec.origin.where('never_slower')}: layers are timed at the row counts of an evaluation, which there is "
            "none of here. Give never_slower to TinyQCallback; the YAML that its run leaves beside the checkpoint has "
            "the layers left float as rules, and is good here as well"
        )
    found = find_sites(model) if sites is None else sites
    check_patterns(spec, model, found)
    by_name = {site.name: site for site in found}
    made, refused, checked = dict[str, Wanted](), [], set[str]()
    for name, site in by_name.items():
        made[name] = _structural(spec, site, by_name, why_float)
        _free_parametrized(site)
    for name, site in by_name.items():
        if checked.isdisjoint(site.tied) and all(made[each].method != "float" for each in (name, *site.tied)):
            checked.add(name)
            with with_values(site.module):
                bad = _check_values(site)
                _free_parametrized(site)
            if bad and spec.non_finite == "float":
                made[name] = Wanted("float", "non-finite weights", "layer")
            elif bad:
                refused.append(f"{name}: {bad} of {sum(size.count for size in site.sizes.values())}")
    if refused:
        raise ModelError(
            f"weights that are NaN or infinite cannot be quantized ({'; '.join(refused)}). Find out what made "
            "them so, exclude these layers, or set non_finite: float to leave them as they are"
        )
    decisions: dict[str, Decision] = {}
    for name, site in by_name.items():
        wanted = made[name]
        partners = sorted(site.tied, key=lambda other: -len(by_name[other].methods))
        stays_float = next((other for other in partners if made[other].method == "float"), None)
        if wanted.method != "float" and stays_float is not None:
            wanted = Wanted("float", f"tied to {stays_float}.weight ({made[stays_float].reason})", "tie")
        tied_to = next((other for other in site.tied if other in decisions), None)
        decisions[name] = _decision(site, wanted, tied_to, spec.kernel)
    return Plan(tuple(decisions.values()), spec, _others(model, found))


def _structural(
    spec: QuantizationSpec, site: Site, sites: Mapping[str, Site], why_float: Callable[[Site], str | None]
) -> Wanted:
    """Method and reason by the spec and by what the layer is, without its values and what its ties leave float."""
    wanted = wanted_method(spec, site.names)
    if isinstance(site.module, QuantizedLayer):
        return Wanted(site.module.method, "already quantized", "layer")
    if not any(each.kind.name in spec.kinds for each in (site, *(sites[name] for name in site.tied))):
        return Wanted("float", f"kind {site.kind.name} is switched off", "spec")
    if wanted.decided_by == "spec":  # nothing names it, so it is what leads it
        leaders = [sites[name] for name in site.tied if _rank(spec, sites[name]) > _rank(spec, site)]
        theirs = [(each.name, _structural(spec, each, sites, why_float)) for each in leaders]
        if theirs:
            name, other = next((each for each in theirs if each[1].method != "float"), theirs[0])
            why = f" ({other.reason})" if other.method == "float" else ""
            wanted = Wanted(other.method, f"tied to {name}.weight{why}", "tie")
    if wanted.method == "float":
        return wanted
    if (left := why_float(site)) is not None:
        return Wanted("float", left, "layer")
    if site.is_lazy:
        kind = type(site.original).__name__
        raise ModelError(f"{site.name}: this {kind} has no weight yet: run one batch through the model first")
    return wanted


def _rank(spec: QuantizationSpec, site: Site) -> tuple[bool, int]:
    """Which of two layers with the same weight decides on both if the spec names neither: that of the higher rank."""
    return site.kind.name in spec.kinds, len(site.methods)


def _decision(site: Site, wanted: Wanted, tied_to: str | None, kernel: KernelName) -> Decision:
    held = {name: getattr(site.module, name, None) for name in (*site.module._parameters, "bias")}
    extra = sum(
        kept.numel() * kept.element_size()
        for name, kept in held.items()
        if name not in site.weights and isinstance(kept, Tensor) and not isinstance(kept, UninitializedParameter)
    )
    sizes = list(site.sizes.values()) if tied_to is None else []
    float_bytes = extra + sum(size.count for size in sizes) * site.dtype.itemsize
    method, reason, by = wanted
    asked = None
    if method != "float" and not site.is_quantized:
        method, why = site.kind.method_for(site.module, method)
        if why is not None:
            reason, asked = f"{reason}; {why}", wanted.method
    return Decision(
        name=site.name,
        method=method,
        reason=reason,
        weight_sqnr_db=None,
        float_bytes=float_bytes,
        bytes=float_bytes if method == "float" else extra + sum(size.bytes for size in sizes),
        aliases=site.names[1:],
        tied_to=tied_to,
        kind=site.kind.name,
        kernel=_kernel(site, method, kernel),
        asked=asked,
        decided_by=cast(DecidedBy, by),
    )


def _kernel(site: Site, method: str, kernel: KernelName) -> Choice | None:
    if isinstance(site.module, QuantizedLayer):
        return site.module.choice
    return None if method == "float" else site.kind.choice(site.module, method, kernel)


def _others(model: nn.Module, sites: Iterable[Site]) -> tuple[OtherWeight, ...]:
    """The parameters with two dimensions or more that no layer of the plan has and no metric holds."""
    apart = {id(tensor) for site in sites for place in site.weights.values() for tensor, _ in weights_of(*place)}
    apart |= {id(p) for module in model.modules() if is_metric(module) for p in module.parameters()}
    return tuple(
        OtherWeight(name, tuple(parameter.shape), parameter.numel() * parameter.element_size())
        for name, parameter in model.named_parameters()
        if not is_lazy(parameter) and parameter.dim() >= 2 and id(parameter) not in apart
    )


def _free_parametrized(site: Site) -> None:
    """Return the memory of a weight that was made only to be looked at, so that the heap does not grow with each."""
    if site.is_parametrized:
        gc.collect(1)  # torch's property of the weight holds its module, and what was computed, in a cycle
        return_freed_memory()


def _check_values(site: Site) -> int:
    """How many of a layer's weights are not finite."""
    if site.is_quantized:
        return 0
    weights = site.kind.float_weights(site.module).values()
    if any(weight.is_meta for weight in weights):
        raise ModelError(f"{site.name}: its weight is on the meta device and has no values: load the model first")
    return sum(count_non_finite(weight) for weight in weights)
