"""Model structure replacement: walk the modules, put quantized layers in the place of ``nn.Linear``.

``quantize`` and ``Quantizer`` do it for good; ``quantized`` puts the float layers back afterwards.
"""

from __future__ import annotations

import gc
import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from tinyq_lightning.durable import replace_file
from tinyq_lightning.errors import ModelError, SpecError
from tinyq_lightning.heap import return_freed_memory
from tinyq_lightning.layers import LAYERS, QuantizedEmbedding, QuantizedLinear, float_weight
from tinyq_lightning.making import QuantizedLayers, dress, refuse_root
from tinyq_lightning.plan import Plan
from tinyq_lightning.resolution import Present, resolve
from tinyq_lightning.sites import Site, find_sites, is_layer
from tinyq_lightning.spec import QuantizationSpec, SpecLike, as_spec
from tinyq_lightning.swap import Swap

__all__ = [
    "Quantizer",
    "quantize",
    "quantize_by_layer",
    "quantized",
    "replace_linear_with_target_and_quantize",
    "state_bytes",
]


def quantize(model: nn.Module, spec: SpecLike = "w8a32") -> Plan:
    """Quantize the Linear layers of any ``nn.Module``, in place.

    All is checked first: where the spec or a weight is refused, nothing is changed. Then float weights are
    let go layer by layer, the largest last, so that at no time more is held than the float weights and the codes
    of one layer. What shares a weight, and the projections of one attention, go together. Whoever interrupts that
    finds each layer either float or quantized, and the next call does the rest.

    Args:
        model: any module with ``nn.Linear`` somewhere below it.
        spec: a method name, a path to YAML, a mapping, or a ``QuantizationSpec``.

    Returns:
        The plan that was carried out.

    Raises:
        SpecError: the spec is wrong or does not fit the model.
        ModelError: the model is itself an ``nn.Linear``, or a weight cannot be quantized.
    """
    return quantize_by_layer(model, as_spec(spec), nullcontext)


def quantize_by_layer(model: nn.Module, spec: QuantizationSpec, present: Present) -> Plan:
    """As :func:`quantize`, for a model whose weights are had one layer at a time.

    Args:
        model: any module with ``nn.Linear`` somewhere below it.
        spec: what to quantize, and how.
        present: gives a block in which the weights of a layer have their values.
    """
    refuse_root(model)
    _warn_of_budget(spec)
    return _carry_out(resolve(spec, model, present), model, present)


def _warn_of_budget(spec: QuantizationSpec) -> None:
    if spec.budget:
        warnings.warn(
            f"{spec.origin.where('budget')}: there is no evaluation here to keep a budget by, so the methods of the "
            "spec are carried out as they are. TinyQCallback keeps it, and leaves a spec that gives its plan here too",
            stacklevel=4,
        )


def _carry_out(plan: Plan, model: nn.Module, present: Present = nullcontext) -> Plan:
    """Put layers in the place of float ones as soon as they are made. Returns the plan with the SQNR of each."""
    sites = {site.name: site for site in find_sites(model)}
    sizes = {decision.name: decision.float_bytes for decision in plan}
    much = sum(sizes.values()) / 16
    layers, freed, in_cycles = QuantizedLayers(plan), 0, False
    for names in _groups(plan, sites):
        pairs = []
        for name in names:
            site = sites.pop(name)  # with its last holder, a float weight goes
            with present(site.module):
                layer = layers.make(site)
            if layer is not None:
                pairs.append((site, layer))
                freed += sizes[name]
                in_cycles |= site.is_parametrized
            del site
        _put_in(pairs)
        if freed > much or not sites:
            pairs.clear()
            if in_cycles:  # torch has the properties of a parametrized module hold that module
                gc.collect()
            return_freed_memory()
            freed, in_cycles = 0, False
    return layers.plan


def _put_in(pairs: Sequence[tuple[Site, nn.Module]]) -> None:
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
        model: any module with ``nn.Linear`` somewhere below it.
        spec: a method name, a path to YAML, a mapping, or a ``QuantizationSpec``.

    Yields:
        The plan, with the SQNR of each quantized weight.

    Raises:
        SpecError: the spec is wrong or does not fit the model.
        ModelError: the model is itself an ``nn.Linear``, or a weight cannot be quantized.
    """
    asked = as_spec(spec)
    _warn_of_budget(asked)
    with Swap(model, asked) as swap:
        yield swap.plan


class Quantizer:
    """Quantizes a model in place, as the tutorial has it.

    Args:
        model: any module with ``nn.Linear`` somewhere below it, or an ``nn.Linear`` itself.
        logger: told what was done; the logger ``tinyq_lightning`` by default.

    Attributes:
        quantized_model: the result of :meth:`quantize`, None before it.
        plan: the plan that was carried out, None before it or where the model is one ``nn.Linear``.
    """

    def __init__(self, model: nn.Module, logger: logging.Logger | None = None) -> None:
        self.model = model
        self.logger = logger or logging.getLogger("tinyq_lightning")
        self.quantized_model: nn.Module | None = None
        self.plan: Plan | None = None

    def quantize(self, q_method: str = "w8a32", module_not_to_quantize: Sequence[str] | None = None) -> nn.Module:
        """Quantize the model in place and return it.

        Args:
            q_method: ``w8a32``, ``w8a16`` or ``w8a8``.
            module_not_to_quantize: patterns of layers to leave float; names as in the tutorial do.

        Returns:
            The quantized model: the same object, or the new layer where the model is one ``nn.Linear``.

        Raises:
            SpecError: the method is unknown, or a pattern matches nothing.
            ModelError: a weight cannot be quantized.
        """
        exclude = _names(module_not_to_quantize, "module_not_to_quantize")
        spec = QuantizationSpec.from_dict({"method": q_method, "exclude": exclude})
        if is_layer(self.model) and spec.method in LAYERS:
            target = LAYERS[spec.method]
            self.quantized_model = replace_linear_with_target_and_quantize(self.model, target, exclude)
        else:
            self.plan = quantize(self.model, spec)
            self.quantized_model = self.model
            self.logger.info("quantized %s\n%s", type(self.model).__name__, self.plan.table())
        return self.quantized_model

    def save_model(self, path: str | os.PathLike[str]) -> None:
        """Write the quantized model's ``state_dict`` to ``path`` as ``torch.save`` does, whole or not at all.

        Args:
            path: local, or a URL that fsspec knows. Folders are made, a file that is there is replaced.

        Raises:
            ModelError: :meth:`quantize` has not been called.
            CheckpointError: it could not be written; what was there before is untouched.
        """
        if self.quantized_model is None:
            raise ModelError("there is no quantized model to save yet: call quantize() first")
        replace_file(path, partial(torch.save, self.quantized_model.state_dict()))


def replace_linear_with_target_and_quantize(
    module: nn.Module, target_class: type[nn.Module], module_name_to_exclude: Sequence[str] | None
) -> nn.Module:
    """Replace every ``nn.Linear`` below ``module`` by a ``target_class``, its weight quantized, its bias kept.

    Unlike :func:`quantize` also those that int8 does not make smaller: a target class may have other reasons.

    Args:
        module: where to begin; where it is an ``nn.Linear`` itself, the layer that replaces it is returned.
        target_class: one of this package's layers, or any class built as ``(in_features, out_features,
            bias=..., [dtype=...])`` with ``.quantize(weight)`` and a settable ``.bias``.
        module_name_to_exclude: patterns of layers to leave alone; leaf names as in the tutorial do.

    Returns:
        ``module``, or the new layer where ``module`` is an ``nn.Linear``.

    Raises:
        SpecError: a pattern matches nothing.
        ModelError: a weight cannot be quantized; nothing has been replaced then.
    """
    exclude = _names(module_name_to_exclude, "module_name_to_exclude")
    ours = isinstance(target_class, type) and issubclass(target_class, QuantizedLinear)
    if not ours and not callable(getattr(target_class, "quantize", None)):
        raise SpecError(f"target_class {target_class!r} has no .quantize(weight)")
    if is_layer(module):
        if exclude:
            raise SpecError(
                f"module is itself a {type(module).__name__} without a name, so nothing can match {exclude}"
            )
        # it is replaced as the one child of a container; what refuses a child refuses it too
        container = nn.Sequential(module)
        replace_linear_with_target_and_quantize(container, target_class, [])
        if container[0] is module:
            why = find_sites(container)[0].why_float or f"a {target_class.__name__} can stand for an nn.Linear only"
            raise ModelError(f"the module is a {type(module).__name__} that cannot be replaced: {why}")
        return container[0]
    method = target_class.method if ours else "w8a32"  # type: ignore[attr-defined]
    spec = QuantizationSpec.from_dict({"method": method, "exclude": exclude})
    plan = resolve(spec, module, why_left=attrgetter("why_float"))
    if target_class in LAYERS.values():
        _carry_out(plan, module)
        return module
    # all are made before the first is put in, since a class of others may raise at any of them
    layers: dict[str, nn.Module | None] = {}
    sites = find_sites(module)
    for site, decision in zip(sites, plan, strict=True):
        shares = layers[decision.tied_to] if decision.tied_to else None
        layers[site.name] = None if decision.method == "float" else _target_layer(site, target_class, shares)
    _put_in([(site, layer) for site in sites if (layer := layers[site.name]) is not None])
    return module


def _target_layer(site: Site, target_class: Any, shares: Any) -> nn.Module | None:
    """What takes the place of ``site``, with the codes of ``shares``; None where it stays."""
    layer: nn.Module
    if isinstance(target_class, type) and issubclass(target_class, QuantizedLinear):
        if isinstance(site.module, nn.Embedding):
            layer = QuantizedEmbedding.from_embedding(site.module, shares)
        elif isinstance(site.module, nn.Linear):
            layer = target_class.from_linear(site.module, shares)
        else:
            return None
    elif isinstance(site.module, nn.Linear) and _is_plain(site):
        layer = _foreign_layer(site.module, target_class)
    else:
        return None
    dress(layer, site)
    return layer


def _is_plain(site: Site) -> bool:
    """Whether a class that knows nothing of us can stand for the layer: one on its own."""
    return site.original is site.module and not (site.tied or site.attention)


def _foreign_layer(linear: nn.Linear, target_class: Any) -> nn.Module:
    weight = float_weight(linear)
    parameters = inspect.signature(target_class).parameters.values()
    takes_dtype = any(p.name == "dtype" or p.kind is p.VAR_KEYWORD for p in parameters)
    dtype = {"dtype": weight.dtype} if takes_dtype else {}
    layer: nn.Module = target_class(linear.in_features, linear.out_features, bias=linear.bias is not None, **dtype)
    layer.quantize(weight.detach())  # type: ignore[operator]
    if linear.bias is not None:
        layer.bias = linear.bias
    return layer


def _names(names: Sequence[str] | None, argument: str) -> list[str]:
    if isinstance(names, str):
        raise SpecError(f"{argument} must be a list of names, not the text {names!r}: write [{names!r}]")
    return list(names or ())


def state_bytes(state_dict: Mapping[str, Any]) -> int:
    """Bytes of the tensors of a state dict, those that are shared counted once."""
    tensors = {
        (value.untyped_storage()._cdata, value.storage_offset()): value.numel() * value.element_size()
        for value in state_dict.values()
        if isinstance(value, Tensor)
    }
    return sum(tensors.values())
