"""A spec resolved against one model: spec × model → plan."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from tinyq_lightning.errors import ModelError, SpecError
from tinyq_lightning.kernels import Choice, count_non_finite
from tinyq_lightning.layers import QuantizedLayer, why_fixed
from tinyq_lightning.methods import METHODS, KernelName
from tinyq_lightning.plan.bits import method_of, with_common_bits
from tinyq_lightning.plan.checks import check_patterns, is_on, sites_for
from tinyq_lightning.plan.coverage import held_weights
from tinyq_lightning.plan.heap import return_freed_memory
from tinyq_lightning.plan.plan import DecidedBy, Decision, OtherWeight, Plan
from tinyq_lightning.plan.sites import Site, is_metric
from tinyq_lightning.plan.ties import weights_of
from tinyq_lightning.plan.why_float import why_stays_float
from tinyq_lightning.spec import MEASURED_BY, QuantizationSpec, Wanted, wanted_method

__all__ = [
    "WithValues",
    "resolve",
]

WithValues = Callable[[nn.Module], AbstractContextManager[object]]
"""A function that gives a context manager in which a layer of a model without values has its real weights."""


WhyFloat = Callable[[Site, int], "str | None"]
"""A function that gives why a layer stays float with codes of so many bits; None if it need not."""


def resolve(
    spec: QuantizationSpec,
    model: nn.Module,
    with_values: WithValues = nullcontext,
    why_float: WhyFloat = why_stays_float,
    sites: Sequence[Site] | None = None,
) -> Plan:
    """One decision for every layer of ``model`` that is of a known kind; nothing is changed.

    Args:
        spec: what was asked for.
        model: any module with layers of a known kind somewhere below it.
        with_values: gives a block in which a layer has its real weights, for a model that is without.
        why_float: why a layer stays float whatever the spec says, with codes of so many bits; None if it need not.
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
    found = sites_for(spec, model) if sites is None else sites
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
    made = with_common_bits(made, by_name)
    for name, site in by_name.items():
        wanted = made[name]
        partners = sorted(site.tied, key=lambda other: -len(by_name[other].methods))
        stays_float = next((other for other in partners if made[other].method == "float"), None)
        if wanted.method != "float" and stays_float is not None:
            measured = made[stays_float].decided_by in MEASURED_BY
            against = f", against {wanted.reason}" if wanted.decided_by == "rule" and not measured else ""
            wanted = Wanted("float", f"tied to {stays_float}.weight ({made[stays_float].reason}){against}", "tie")
        before = [decisions[other] for other in site.tied if other in decisions]
        decisions[name] = _decision(site, wanted, before, spec.kernel)
    return Plan(tuple(decisions.values()), spec, _others(model, found), held_weights(model))


def _structural(spec: QuantizationSpec, site: Site, sites: Mapping[str, Site], why_float: WhyFloat) -> Wanted:
    """Method and reason by the spec and by what the layer is, without its values and what its ties leave float."""
    wanted = wanted_method(spec, site.names)
    if isinstance(site.module, QuantizedLayer):
        return Wanted(site.module.method, "already quantized", "layer")
    if not any(is_on(spec, each) for each in (site, *(sites[name] for name in site.tied))):
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
    bits = 8 if site.is_lazy else METHODS[method_of(site, wanted.method)[0]].bits
    if (left := why_float(site, bits)) is not None:
        return Wanted("float", left, "layer")
    if site.is_lazy:
        kind = type(site.original).__name__
        raise ModelError(f"{site.name}: this {kind} has no weight yet: run one batch through the model first")
    return wanted


def _rank(spec: QuantizationSpec, site: Site) -> tuple[bool, int]:
    """Which of two layers with the same weight decides on both if the spec names neither: that of the higher rank."""
    return is_on(spec, site), len(site.methods)


def _decision(site: Site, wanted: Wanted, tied: Sequence[Decision], kernel: KernelName) -> Decision:
    held = {name: getattr(site.module, name, None) for name in (*site.module._parameters, "bias")}
    extra = sum(
        kept.numel() * kept.element_size()
        for name, kept in held.items()
        if name not in {*site.weights, *site.computed_from}
        and isinstance(kept, Tensor)
        and not isinstance(kept, UninitializedParameter)
    )
    sizes = [] if tied else list(site.sizes.values())
    float_bytes = extra + sum(size.count for size in sizes) * site.dtype.itemsize
    method, reason, by = wanted
    asked = None
    if method != "float" and not site.is_quantized:
        method, why = method_of(site, method)
        if why is not None:
            reason, asked = f"{reason}; {why}", wanted.method
        reason = "; ".join((reason, *filter(None, (why_fixed(site.module, name) for name in site.weights))))
    choice = _kernel(site, method, kernel)
    others = [each.kernel for each in tied if each.kernel is not None]
    beside = choice.bytes_beside(others) if others and choice is not None else 0
    return Decision(
        name=site.name,
        method=method,
        reason=reason,
        weight_sqnr_db=None,
        float_bytes=float_bytes,
        bytes=float_bytes if method == "float" else extra + sum(size.bytes(METHODS[method].bits) for size in sizes),
        aliases=site.names[1:],
        tied_to=tied[0].name if tied else None,
        kind=site.kind.name,
        kernel=choice,
        asked=asked,
        weights=sum(size.count for size in sizes),
        shared_bytes=int(beside * sum(size.count for size in site.sizes.values())),
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
