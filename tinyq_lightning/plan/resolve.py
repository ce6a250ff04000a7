"""A spec resolved against one model: spec × model → plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.nn.parameter import UninitializedParameter

from tinyq_lightning.errors import ModelError, SpecError
from tinyq_lightning.kernels import Choice, choose_kernel, count_non_finite
from tinyq_lightning.layers import Int8Weight, QuantizedEmbedding, QuantizedLinear, float_weight
from tinyq_lightning.methods import METHODS, KernelName
from tinyq_lightning.plan.heap import return_freed_memory
from tinyq_lightning.plan.plan import Decision, Plan
from tinyq_lightning.plan.sites import Site, dtype_of, find_sites, shape_of
from tinyq_lightning.spec import (
    QuantizationSpec,
    deciding_rule,
    excluding,
    is_measured,
    nearest,
    pattern_matches,
    wanted_method,
)

__all__ = [
    "Present",
    "check_patterns",
    "resolve",
    "why_left_float",
]

_SCALE_BYTES = 4  # one float32 a row


Present = Callable[[nn.Module], AbstractContextManager[object]]


def check_patterns(spec: QuantizationSpec, model: nn.Module) -> None:
    """Check the spec's patterns against the names in ``model``, without a look at any weight.

    Raises:
        ModelError: the model has no Linear layer.
        SpecError: a pattern matches nothing, a rule is shadowed by what stands before it, or nothing is
            left to quantize.
    """
    sites = find_sites(model)
    if not sites:
        kinds = Counter(type(m).__name__ for m in model.modules() if not m._modules and m._parameters)
        has = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4)) or "no layers"
        raise ModelError(f"{type(model).__name__} has no nn.Linear to quantize (it has {has})")
    for index, pattern in enumerate(spec.exclude):
        if not any(pattern_matches(pattern, name) for site in sites for name in site.names):
            raise SpecError(f"{spec.origin.where('exclude', index)}: {_no_match(pattern, model, sites)}")
    for index, rule in enumerate(spec.rules):
        covered = [site for site in sites if any(pattern_matches(rule.match, name) for name in site.names)]
        where = spec.origin.where("rules", index, "match")
        if not covered:
            raise SpecError(f"{where}: {_no_match(rule.match, model, sites)}")
        if not any(deciding_rule(spec, site.names) == index for site in covered):
            by = excluding(spec, covered[0].names)
            taker = f"exclude {by!r}" if by else f"rule {(deciding_rule(spec, covered[0].names) or 0) + 1}"
            raise SpecError(
                f"{where}: rule {index + 1} ({rule.match!r}) is shadowed: all that it matches, such as "
                f"{covered[0].name!r}, is taken by {taker} before it. Move it up, narrow the other, or remove it"
            )
    linears = [site for site in sites if not site.is_embedding]
    wanted = [wanted_method(spec, site.names) for site in linears]
    if all(method == "float" and not is_measured(reason) for method, reason in wanted):
        raise SpecError(f"{spec.origin.where()}: this spec leaves all {len(linears)} Linear layers float")


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
    return f"pattern {pattern!r} matches no Linear layer.{hint or ''} The layers are: {shown}"


def why_left_float(site: Site) -> str | None:
    """Why a layer stays float whatever the spec says: it cannot be replaced, or a file would not shrink by it."""
    if site.why_float or isinstance(site.module._parameters.get("weight"), UninitializedParameter):
        return site.why_float
    columns, size = shape_of(site.module)[1], dtype_of(site).itemsize
    if columns + _SCALE_BYTES < columns * size:
        return None
    return f"int8 is no smaller: {columns} + {_SCALE_BYTES} bytes a row, {columns * size} as float"


def resolve(
    spec: QuantizationSpec,
    model: nn.Module,
    present: Present = nullcontext,
    why_left: Callable[[Site], str | None] = why_left_float,
) -> Plan:
    """One decision for every Linear layer of ``model`` and every embedding tied to one; nothing is changed.

    Args:
        spec: what was asked for.
        model: any module with ``nn.Linear`` somewhere below it.
        present: gives a block in which the weights of a layer have their values, where the model is without.
        why_left: why a layer stays float whatever the spec says; None where it need not.

    Raises:
        ModelError: a layer that would be quantized has no values yet, tensors of other shapes than its sizes
            tell of or, unless the spec says ``non_finite: float``, values that are not finite. The message
            names layers and counts.
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
    check_patterns(spec, model)
    sites = {site.name: site for site in find_sites(model)}
    made, refused, checked = dict[str, tuple[str, str]](), [], set[str]()
    for name, site in sites.items():
        made[name] = _structural(spec, site, sites, why_left)
        _let_go(site)
    for name, site in sites.items():
        if checked.isdisjoint(site.tied) and all(made[each][0] != "float" for each in (name, *site.tied)):
            checked.add(name)
            with present(site.module):
                bad = _check_values(site)
                _let_go(site)
            if bad and spec.non_finite == "float":
                made[name] = ("float", "non-finite weights")
            elif bad:
                refused.append(f"{name}: {bad} of {site.weight_like.numel()}")
    if refused:
        raise ModelError(
            f"weights that are NaN or infinite cannot be quantized ({'; '.join(refused)}). Find out what made "
            "them so, exclude these layers, or set non_finite: float to leave them as they are"
        )
    decisions: dict[str, Decision] = {}
    for name, site in sites.items():
        method, reason = made[name]
        partners = sorted(site.tied, key=lambda other: sites[other].is_embedding)
        stays_float = next((other for other in partners if made[other][0] == "float"), None)
        if method != "float" and stays_float is not None:
            method, reason = "float", f"tied to {stays_float}.weight ({made[stays_float][1]})"
        tied_to = next((other for other in site.tied if other in decisions), None)
        decisions[name] = _decision(site, method, reason, tied_to, spec.kernel)
    return Plan(tuple(decisions.values()), spec)


def _structural(
    spec: QuantizationSpec, site: Site, sites: Mapping[str, Site], why_left: Callable[[Site], str | None]
) -> tuple[str, str]:
    """Method and reason by the spec and by what the layer is, without its values and its ties."""
    method, reason = wanted_method(spec, site.names)
    if isinstance(site.module, QuantizedLinear):
        return site.module.method, "already quantized"
    if site.is_embedding:
        linears = [sites[name] for name in site.tied if not sites[name].is_embedding]
        theirs = [(linear.name, *_structural(spec, linear, sites, why_left)) for linear in linears]
        if isinstance(site.module, QuantizedEmbedding):
            return (theirs[0][1] if theirs else method), "already quantized"
        if reason == "spec":  # nothing names it, so it is what the Linear is
            name, method, why = next((each for each in theirs if each[1] != "float"), theirs[0])
            reason = f"tied to {name}.weight" + (f" ({why})" if method == "float" else "")
    if method == "float":
        return method, reason
    if left := why_left(site):
        return "float", left
    if isinstance(site.module._parameters.get("weight"), UninitializedParameter):
        raise ModelError(f"{site.name}: this LazyLinear has no weight yet: run one batch through the model first")
    _refuse_shapes(site)
    return method, reason


def _decision(site: Site, method: str, reason: str, tied_to: str | None, kernel: KernelName) -> Decision:
    rows, columns = shape_of(site.module)
    bias = site.module.bias if isinstance(site.module, nn.Linear | QuantizedLinear) else None
    extra = 0 if bias is None or isinstance(bias, UninitializedParameter) else bias.numel() * bias.element_size()
    float_bytes = extra + (rows * columns * dtype_of(site).itemsize if tied_to is None else 0)
    quantized = extra + (rows * (columns + _SCALE_BYTES) if tied_to is None else 0)
    now = float_bytes if method == "float" else quantized
    return Decision(
        site.name, method, reason, None, float_bytes, now, site.names[1:], tied_to, _kernel(site, method, kernel)
    )


def _kernel(site: Site, method: str, kernel: KernelName) -> Choice | None:
    if isinstance(site.module, QuantizedLinear):
        return site.module.choice
    if method == "float" or site.is_embedding:
        return None
    return choose_kernel(kernel, METHODS[method], *shape_of(site.module))


def _refuse_shapes(site: Site) -> None:
    """Refuse a layer whose tensors were exchanged for others than its sizes tell of."""
    shape, expected = site.weight_like.shape, shape_of(site.module)
    if shape != expected:
        raise ModelError(
            f"{site.name}: its weight is {list(shape)} where its sizes tell of {list(expected)}: set its sizes to "
            "those of the weight, or exclude it"
        )
    bias = getattr(site.module, "bias", None)
    if bias is not None and bias.shape != expected[:1]:
        raise ModelError(f"{site.name}: its bias is {list(bias.shape)} and must be {list(expected[:1])}: exclude it")


def _let_go(site: Site) -> None:
    """Have the heap not grow with each weight that was made to be looked at."""
    if site.is_parametrized:
        return_freed_memory()


def _check_values(site: Site) -> int:
    """How many of a layer's weights are not finite."""
    if isinstance(site.module, Int8Weight):
        return 0
    weight = float_weight(site.module)
    if weight.is_meta:
        raise ModelError(f"{site.name}: its weight is on the meta device and has no values: load the model first")
    if not weight.is_floating_point():
        raise ModelError(
            f"{site.name}: its weight is {weight.dtype}, and only floating point can be quantized: exclude it"
        )
    return count_non_finite(weight)
