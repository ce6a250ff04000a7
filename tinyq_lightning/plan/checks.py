"""Checks of a spec against one model, by names and by what its layers are: no values are looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

from torch import nn
from torch.nn.parameter import is_lazy

from tinyq_lightning.errors import ModelError, SpecError
from tinyq_lightning.layers import is_replaceable
from tinyq_lightning.methods import KIND_NAMES
from tinyq_lightning.plan.sites import Site, find_sites
from tinyq_lightning.plan.why_float import why_stays_float
from tinyq_lightning.spec import (
    MEASURED_BY,
    QuantizationSpec,
    deciding_rule,
    excluding,
    names_parameter,
    nearest,
    pattern_matches,
    wanted_method,
)

__all__ = [
    "check_model",
    "check_patterns",
    "is_on",
    "refuse_root",
    "sites_for",
]


def sites_for(spec: QuantizationSpec, model: nn.Module) -> list[Site]:
    """The layers of a model, and the parameters that the spec names beside them."""
    return find_sites(model, partial(names_parameter, spec))


def is_on(spec: QuantizationSpec, site: Site) -> bool:
    """Whether the spec is about layers of this kind. A parameter is a layer only where a rule names it."""
    return site.kind.name in spec.kinds or site.kind.name not in KIND_NAMES


def check_patterns(spec: QuantizationSpec, model: nn.Module, sites: Sequence[Site] | None = None) -> None:
    """Check the spec's patterns against the names in ``model``, without a look at any weight.

    Args:
        spec: what was asked for.
        model: any module with layers of a known kind somewhere below it.
        sites: its layers, where they have been found already.

    Raises:
        ModelError: the model has no layer of a known kind, or none that can be quantized.
        SpecError: a pattern matches nothing, a rule is shadowed by what stands before it, two layers with the
            same weight are named by entries that contradict each other, or nothing is left to quantize.
    """
    sites = sites_for(spec, model) if sites is None else sites
    if not sites:
        kinds = Counter(type(each).__name__ for each in model.modules() if each._parameters)
        has = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4)) or "no layers"
        matrix = next((name for name, each in model.named_parameters() if not is_lazy(each) and each.dim() > 1), None)
        advice = "" if matrix is None else f". A rule may name a parameter: match: {matrix}, method: w8a32"
        raise ModelError(f"{type(model).__name__} has no layer to quantize (it has {has}){advice}")
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
    _refuse_contradictions(spec, sites)
    if not on:
        there = ", ".join(sorted({site.kind.name for site in sites}))
        where = f"{spec.origin.where('kinds')}: " if spec.origin.places else ""
        raise ModelError(
            f"{where}{type(model).__name__} has no layer of the kinds {', '.join(spec.kinds)} to quantize (it has some "
            f"of {there})"
        )
    wanted = [wanted_method(spec, site.names) for site in on]
    if all(each.method == "float" and each.decided_by not in MEASURED_BY for each in wanted):
        raise SpecError(_nothing_left(spec, on))


def _nothing_left(spec: QuantizationSpec, on: Sequence[Site]) -> str:
    """That a spec leaves these layers float, and by which of its entries."""
    left = f"all {len(on)} layers" if len(on) > 1 else "the only layer"
    deciding = dict(_deciding_entry(spec, site)[:2] for site in on)
    if len(deciding) == 1:
        ((path, entry),) = deciding.items()
        return f"{spec.origin.where(*path)}: {entry} leaves {left} float, so there is nothing to quantize"
    entries = [f"{entry} at {spec.origin.where(*path)}" for path, entry in deciding.items()]
    return (
        f"{spec.origin.where()}: this spec leaves {left} float, so there is nothing to quantize: {', '.join(entries)}"
    )


def _deciding_entry(spec: QuantizationSpec, site: Site) -> tuple[tuple[str | int, ...], str, str | None]:
    """The entry of a spec that decides for a layer: its place, what it says, and its pattern if the user wrote one."""
    if (pattern := excluding(spec, site.names)) is not None:
        return ("exclude", spec.exclude.index(pattern)), repr(pattern), pattern
    if (index := deciding_rule(spec, site.names)) is not None:
        rule = spec.rules[index]
        said = f"rule {index + 1} ({rule.match!r}: {rule.method})"
        return ("rules", index, "match"), said, rule.match if rule.decided_by == "rule" else None
    return ("method",), repr(spec.method), None


def _refuse_contradictions(spec: QuantizationSpec, sites: Sequence[Site]) -> None:
    """Refuse to quantize one of two layers with the same weight where each is named, and one as float."""
    named = {site.name: where for site in sites if (where := _names_it(spec, site)) is not None}
    for site in sites:
        for other in site.tied if site.name in named else ():
            methods = [wanted_method(spec, each.names).method for each in sites if each.name in (site.name, other)]
            if other in named and methods.count("float") == 1:
                raise SpecError(
                    f"{named[site.name]} and {named[other]} contradict each other: {site.name} and {other} have the "
                    "same weight, which is either float or quantized. Give both the same method or float, or name one"
                )


def _names_it(spec: QuantizationSpec, site: Site) -> str | None:
    """Where the spec names this layer alone, not by a glob: the place of the entry that decides."""
    path, _, pattern = _deciding_entry(spec, site)
    literal = {part for name in site.names for part in (name, name.rpartition(".")[2])}
    return spec.origin.where(*path) if pattern in literal else None


def _switched_on(spec: QuantizationSpec, sites: Sequence[Site]) -> list[Site]:
    """The layers of the spec's kinds, and those that share a weight with one of them."""
    on = {site.name for site in sites if is_on(spec, site)}
    return [site for site in sites if site.name in on or not on.isdisjoint(site.tied)]


def _refuse_idle_pattern(
    spec: QuantizationSpec, pattern: str, where: str, model: nn.Module, sites: Sequence[Site], on: Sequence[Site]
) -> list[Site]:
    """The layers that a pattern matches; refuse one that matches none, or only those of kinds that are off."""
    matched = [site for site in sites if any(pattern_matches(pattern, name) for name in site.names)]
    if not matched:
        of_rule = any(pattern == rule.match for rule in spec.rules)
        raise SpecError(f"{where}: {_no_match(pattern, model, sites, of_rule)}")
    names = {site.name for site in on}
    covered = [site for site in matched if site.name in names]
    if not covered:
        kinds = ", ".join(sorted({site.kind.name for site in matched}))
        off, hint = "is switched off", "add it to kinds, or remove the pattern"
        if not spec.origin.has_kinds:
            off, hint = "stays float here anyway", "remove the pattern"
        raise SpecError(
            f"{where}: pattern {pattern!r} matches only layers of a kind that {off} ({kinds}), such as "
            f"{matched[0].name!r}: {hint}"
        )
    return covered


def check_model(spec: QuantizationSpec, model: nn.Module) -> None:
    """Check all that can be known of ``model`` without its weights: to be called before training.

    Raises:
        ModelError: the model is itself a layer, has none, or every layer of it would stay float.
        SpecError: as :func:`check_patterns`.
    """
    refuse_root(model)
    sites = sites_for(spec, model)
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
    """Refuse what is no module, and a model that is itself a layer: no module holds it for another to take its place.

    Raises:
        ModelError: it is one of these.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"quantize takes a module, not {model!r}: make the module first, and load its weights into it. A file is "
            "quantized by `tinyq-lightning quantize`, and a quantized one is loaded by load_quantized"
        )
    if is_replaceable(model):
        other = ", or use replace_linear_with_target_and_quantize, which returns the new layer"
        raise ModelError(
            f"the model is itself an nn.{type(model).__name__}, which cannot be replaced in place: put it in an "
            f"nn.Sequential{other if isinstance(model, nn.Linear) else ''}"
        )


def _no_match(pattern: str, model: nn.Module, sites: Sequence[Site], of_rule: bool) -> str:
    names = [name for site in sites for name in site.names]
    leaves = {name.split(".")[-1] for name in names}
    other = next(((n, m) for n, m in model.named_modules() if n and pattern_matches(pattern, n)), None)
    below = sorted({n for n, _ in model.named_modules() if n.split(".")[-1] == pattern and "." in n})
    covered = (n for n, p in model.named_parameters() if not is_lazy(p) and p.dim() > 1 and pattern_matches(pattern, n))
    matrix = next((n for n in covered if not is_replaceable(model.get_submodule(n.rpartition(".")[0]))), None)
    if matrix is not None and of_rule:
        holder, _, leaf = matrix.rpartition(".")
        rule = f"{holder}.*" if leaf.isdecimal() else leaf
        hint = (
            f" It covers {matrix!r}, a parameter that no layer has: such are quantized only by a rule that ends with "
            f"their name, here {rule!r}."
        )
    elif other and not any(name.startswith(other[0] + ".") for name in names):
        hint = f" {other[0]!r} is there, but is never quantized: its type is {type(other[1]).__name__}."
    elif below and any(name.startswith(below[0] + ".") for name in names):
        hint = f" To cover {below[0]!r} and the like, write '*.{pattern}'."
    else:
        hint = nearest(pattern, [*names, *leaves], 3)
    shown = ", ".join(names[:6]) + (f", … ({len(names)} in all)" if len(names) > 6 else "")
    return f"pattern {pattern!r} matches no layer.{hint or ''} The layers are: {shown}"
