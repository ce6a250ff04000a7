"""Model structure replacement as the tutorial has it: ``Quantizer`` and its function, for ``nn.Linear`` alone."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from tinyq_lightning.errors import ModelError, SpecError
from tinyq_lightning.file import replace_file
from tinyq_lightning.layers import LAYERS, QuantizedLinear, float_weight, is_replaceable, kind_of
from tinyq_lightning.methods import METHODS
from tinyq_lightning.plan import (
    Plan,
    Site,
    carry_out,
    carry_over,
    find_sites,
    put_in,
    quantize_by_layer,
    quantized_weights,
    resolve,
    why_not_replaced,
)
from tinyq_lightning.spec import Origin, QuantizationSpec, names_near_keywords

__all__ = [
    "Quantizer",
    "replace_linear_with_target_and_quantize",
]


# What the tutorial replaces, and the projections of attention, which are Linears as well.
_KINDS = ["linear", "attention"]


class Quantizer:
    """Quantizes a model in place, as the tutorial has it.

    Args:
        model: any module with ``nn.Linear`` somewhere below it, or an ``nn.Linear`` itself.
        logger: told what was done; the logger ``tinyq_lightning`` by default.

    Attributes:
        quantized_model: the result of :meth:`quantize`, None before it.
        plan: the plan that was carried out, None before it or where the model is one ``nn.Linear``.
    """

    @names_near_keywords
    def __init__(self, model: nn.Module, logger: logging.Logger | None = None) -> None:
        self.model = model
        self.logger = logger or logging.getLogger("tinyq_lightning")
        self.quantized_model: nn.Module | None = None
        self.plan: Plan | None = None

    @names_near_keywords
    def quantize(self, q_method: str = "w8a32", module_not_to_quantize: Sequence[str] | None = None) -> nn.Module:
        """Quantize the model in place and return it.

        Args:
            q_method: ``w8a32``, ``w8a16``, ``w8a8``, ``w4a32``, ``w4a16`` or ``w4a8``.
            module_not_to_quantize: patterns of layers to leave float; names as in the tutorial do.

        Returns:
            The quantized model: the same object, or the new layer where the model is one ``nn.Linear``.

        Raises:
            SpecError: the method is unknown, or a pattern matches nothing.
            ModelError: a weight cannot be quantized.
        """
        exclude = _names(module_not_to_quantize, "module_not_to_quantize")
        spec = _spec(q_method, exclude, "module_not_to_quantize")
        if _is_linear(self.model) and spec.method in LAYERS:
            target = LAYERS[spec.method]
            self.quantized_model = replace_linear_with_target_and_quantize(self.model, target, exclude)
        else:
            self.plan = quantize_by_layer(self.model, spec)
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
    if _is_linear(module):
        if exclude:
            raise SpecError(
                f"module is itself a {type(module).__name__} without a name, so nothing can match {exclude}"
            )
        # it is replaced as the one child of a container; what refuses a child refuses it too
        container = nn.Sequential(module)
        replace_linear_with_target_and_quantize(container, target_class, [])
        if container[0] is module:
            why = (
                why_not_replaced(find_sites(container)[0])
                or f"a {target_class.__name__} can stand for an nn.Linear only"
            )
            raise ModelError(f"the module is a {type(module).__name__} that cannot be replaced: {why}")
        return container[0]
    method = target_class.method if ours else "w8a32"  # type: ignore[attr-defined]
    spec = _spec(method, exclude, "module_name_to_exclude")
    sites = find_sites(module)
    plan = resolve(spec, module, why_float=why_not_replaced, sites=sites)
    if target_class in LAYERS.values():
        carry_out(plan, sites)
        return module
    # all are made before the first is put in, since a class of others may raise at any of them
    layers: dict[str, nn.Module | None] = {}
    for site, decision in zip(sites, plan, strict=True):
        shares = layers[decision.tied_to] if decision.tied_to else None
        layers[site.name] = None if decision.method == "float" else _target_layer(site, target_class, shares)
    put_in([(site, layer) for site in sites if (layer := layers[site.name]) is not None])
    return module


def _target_layer(site: Site, target_class: Any, shares: Any) -> nn.Module | None:
    """What takes the place of ``site``, with the codes of ``shares``; None where it stays."""
    layer: nn.Module
    if site.is_quantized:
        return None
    if isinstance(target_class, type) and issubclass(target_class, QuantizedLinear):
        if isinstance(site.module, nn.Linear):
            layer = target_class.from_linear(site.module, shares)
        else:  # tied to one, whose codes it shares
            method = target_class.method
            codes = quantized_weights(site, METHODS[method].bits)[0] if shares is None else shares.coded_weights()
            layer = site.kind.make(site.module, codes, method, "auto")
    elif isinstance(site.module, nn.Linear) and _is_plain(site):
        layer = _foreign_layer(site.module, target_class)
    else:
        return None
    carry_over(site, layer)
    return layer


def _is_linear(module: nn.Module) -> bool:
    """Whether the model is itself one layer to replace."""
    kind = kind_of(module) if is_replaceable(module) else None
    return kind is not None and kind.name in _KINDS


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


def _spec(method: str, exclude: list[str], argument: str) -> QuantizationSpec:
    """What the tutorial's functions quantize; errors about a pattern name the argument that it was given in."""
    spec = QuantizationSpec.from_dict({"method": method, "kinds": _KINDS, "exclude": exclude})
    return replace(spec, origin=Origin({("exclude",): argument}, has_kinds=False))


def _names(names: Sequence[str] | None, argument: str) -> list[str]:
    if isinstance(names, str):
        raise SpecError(f"{argument} must be a list of names, not the text {names!r}: write [{names!r}]")
    return list(names or ())
