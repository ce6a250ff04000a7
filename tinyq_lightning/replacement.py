"""Model structure replacement: walk the modules, put quantized layers in the place of ``nn.Linear``.

``quantize`` and ``Quantizer`` do it for good; ``quantized`` puts the float layers back afterwards.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from tinyq_lightning.durable import replace_file
from tinyq_lightning.errors import ModelError, SpecError
from tinyq_lightning.forward import KernelName
from tinyq_lightning.layers import LAYERS, QuantizedEmbedding, QuantizedLinear, float_weight
from tinyq_lightning.plan import Decision, Plan, Present, resolve
from tinyq_lightning.sites import Site, find_sites, is_layer
from tinyq_lightning.spec import QuantizationSpec, SpecLike, as_spec
from tinyq_lightning.weight_math import weight_sqnr_db

__all__ = [
    "Quantizer",
    "Swap",
    "quantize",
    "quantize_by_layer",
    "quantized",
    "replace_linear_with_target_and_quantize",
    "state_bytes",
]

# Held by reference, so that a handle the user kept still removes its hook.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def quantize(model: nn.Module, spec: SpecLike = "w8a32") -> Plan:
    """Quantize the Linear layers of any ``nn.Module``, in place.

    Float weights are let go layer by layer. Either every layer of the plan is quantized or, where the
    spec or a weight is refused, none is.

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
    plan = resolve(spec, model, present)
    _refuse_root(model)
    sites = find_sites(model)
    made = _Made()
    for decision in plan:
        site = sites.pop(0)  # with its last holder, a float weight goes
        with present(site.module):
            _make(site, decision, plan.spec.kernel, LAYERS, made)
            layer = made[decision.name][1]
            if layer is not None:
                site.put(layer)
    return Plan(tuple(decision for decision, _ in made.values()), plan.spec)


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
    swap = Swap(model, as_spec(spec))
    with swap:
        yield swap.plan


class Swap:
    """Quantized layers made beside the float ones, to be put in and taken out again.

    Making it changes nothing in the model. As a context manager it is in inside the block.

    Args:
        model: any module with ``nn.Linear`` somewhere below it.
        spec: what to quantize, and how.

    Attributes:
        plan: the decisions, with the SQNR of each quantized weight.

    Raises:
        SpecError: the spec does not fit the model.
        ModelError: the model is itself an ``nn.Linear``, or a weight cannot be quantized.
    """

    def __init__(self, model: nn.Module, spec: QuantizationSpec) -> None:
        plan = resolve(spec, model)
        _refuse_root(model)
        sites, made = find_sites(model), _Made()
        for site, decision in zip(sites, plan, strict=True):
            _make(site, decision, spec.kernel, LAYERS, made)
        self.plan = Plan(tuple(decision for decision, _ in made.values()), spec)
        layers = (layer for _, layer in made.values())
        self._pairs = [(site, layer) for site, layer in zip(sites, layers, strict=True) if layer is not None]

    def or_refuse(self) -> Swap:
        """This swap, where there is something to put in.

        Raises:
            ModelError: there is nothing, as where the model is quantized already; where a run found
                that no layer is better off in int8, that is what was asked for.
        """
        if not self._pairs and not any(decision.measured for decision in self.plan):
            why = "; ".join(f"{decision.name}: {decision.reason}" for decision in self.plan)
            raise ModelError(f"there is nothing to quantize ({why})")
        return self

    def switched(self, changes: Mapping[str, tuple[str, str]]) -> Swap:
        """A swap of the same int8 codes with other methods; nothing is quantized again.

        Args:
            changes: method and reason by the name of a Linear that this swap quantizes; ``float`` leaves it
                alone. What shares its weight follows; every other layer is as in this swap.
        """
        other = copy.copy(self)
        other._pairs = []
        decisions = {decision.name: decision for decision in self.plan}
        for site, layer in self._pairs:
            decision = decisions[site.name]
            source = next((name for name in (site.name, *site.tied) if name in changes), None)
            if source is not None:
                method, reason = changes[source]
                if isinstance(layer, QuantizedEmbedding):  # its reason is the one that its spec resolves to
                    reason = f"tied to {source}.weight ({reason})" if method == "float" else decision.reason
                elif method != "float":
                    layer = layer.with_method(method)
                decisions[site.name] = decision = _changed(decision, method, reason)
            if decision.method != "float":
                other._pairs.append((site, layer))
        other.plan = Plan(tuple(decisions.values()), self.plan.spec)
        return other

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Float inside the block, with each layer called as a module: no fused kernels that go past them."""
        for site, _ in self._pairs:
            site.open()
        try:
            yield
        finally:
            self.take_out()

    @property
    def fused(self) -> bool:
        """Whether torch may run float layers in fused kernels, which call none of them unless they have hooks."""
        return any(site.attention or site.encoder_layers for site, _ in self._pairs)

    def ties(self) -> dict[str, tuple[str, ...]]:
        """The names of those that share a weight with a layer, by its name."""
        return {site.name: site.tied for site, _ in self._pairs}

    def pairs(self) -> Iterator[tuple[str, nn.Linear, QuantizedLinear]]:
        """Name, float layer and quantized layer of each Linear that this swap replaces."""
        for site, layer in self._pairs:
            if isinstance(layer, QuantizedLinear):
                assert isinstance(site.module, nn.Linear)
                yield site.name, site.module, layer

    def put_in(self) -> None:
        """Quantized layers in the model, in the mode (train or eval) of those they stand for."""
        for site, layer in self._pairs:
            layer.train(site.training)
            site.put(layer)

    def take_out(self) -> None:
        """The float layers back, the same objects."""
        for site, _ in self._pairs:
            site.put(site.module)

    @contextmanager
    def taken_out(self) -> Iterator[None]:
        """Float inside the block, quantized again after it."""
        self.take_out()
        try:
            yield
        finally:
            self.put_in()

    def __enter__(self) -> Swap:
        try:
            self.put_in()
        except BaseException:
            self.take_out()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.take_out()


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
    sites, plan = find_sites(module), resolve(spec, module, why_left=attrgetter("why_float"))
    layers: list[nn.Module | None]
    if ours:
        made = _Made()
        for site, decision in zip(sites, plan, strict=True):
            _make(site, decision, spec.kernel, {method: target_class}, made)  # type: ignore[dict-item]
        layers = [layer for _, layer in made.values()]
    else:
        layers = [
            _target_layer(site, target_class) if decision.method != "float" and _is_plain(site) else None
            for site, decision in zip(sites, plan, strict=True)
        ]
    for site, layer in zip(sites, layers, strict=True):
        if layer is not None:
            site.put(layer)
    return module


def _is_plain(site: Site) -> bool:
    """Whether a class that knows nothing of us can stand for the layer: an ``nn.Linear`` on its own."""
    return site.original is site.module and isinstance(site.module, nn.Linear) and not (site.tied or site.attention)


def _target_layer(site: Site, target_class: Any) -> nn.Module:
    linear = site.module
    assert isinstance(linear, nn.Linear)
    weight = float_weight(linear)
    parameters = inspect.signature(target_class).parameters.values()
    takes_dtype = any(p.name == "dtype" or p.kind is p.VAR_KEYWORD for p in parameters)
    dtype = {"dtype": weight.dtype} if takes_dtype else {}
    layer: nn.Module = target_class(linear.in_features, linear.out_features, bias=linear.bias is not None, **dtype)
    layer.quantize(weight.detach())  # type: ignore[operator]
    if linear.bias is not None:
        layer.bias = linear.bias
    _dress(layer, site)
    return layer


class _Made(dict[str, tuple[Decision, "QuantizedLinear | QuantizedEmbedding | None"]]):
    """By name: the decision that was carried out, and the layer; None where the model keeps what it has."""


def _make(
    site: Site, decision: Decision, kernel: KernelName, layers: Mapping[str, type[QuantizedLinear]], made: _Made
) -> None:
    """Make the layer that takes the place of ``site``, if any, after those that it may share its codes with."""
    module = site.module
    layer: QuantizedLinear | QuantizedEmbedding | None = None
    if decision.method != "float" and isinstance(module, nn.Linear | nn.Embedding):
        first, shares = made[decision.tied_to] if decision.tied_to else (None, None)
        if isinstance(module, nn.Embedding):
            layer = QuantizedEmbedding.from_embedding(module, shares)
        else:
            layer = linear = layers[decision.method].from_linear(module, shares)
            linear.kernel = kernel
        _dress(layer, site)
        sqnr = first.weight_sqnr_db if first else weight_sqnr_db(float_weight(module), layer.int8_weights, layer.scales)
        decision = replace(decision, weight_sqnr_db=sqnr)
    made[decision.name] = decision, layer


def _changed(decision: Decision, method: str, reason: str) -> Decision:
    if method == "float":
        return replace(decision, method=method, reason=reason, weight_sqnr_db=None, bytes=decision.float_bytes)
    return replace(decision, method=method, reason=reason)


def _dress(layer: nn.Module, site: Site) -> None:
    """Give ``layer`` the hooks, the mode and the users' own attributes of the layer it stands for."""
    for name, value in vars(site.original).items():
        if name in _HOOKS or (name not in vars(layer) and name != "_compiled_call_impl"):
            vars(layer)[name] = value
    layer.train(site.training)


def _refuse_root(model: nn.Module) -> None:
    if is_layer(model):
        raise ModelError(
            f"the model is itself an nn.{type(model).__name__}, which cannot be replaced in place: put it in an "
            "nn.Sequential, or use replace_linear_with_target_and_quantize, which returns the new layer"
        )


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
