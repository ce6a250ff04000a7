"""The quantized layer that takes the place of a float one, with all that its user hung on that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from tinyq_lightning.errors import ModelError
from tinyq_lightning.forward import KernelName
from tinyq_lightning.layers import QuantizedEmbedding, QuantizedLinear, float_weight
from tinyq_lightning.plan import Decision
from tinyq_lightning.sites import Site, is_layer
from tinyq_lightning.weight_math import weight_sqnr_db

__all__ = ["Made", "dress", "make", "refuse_root"]

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


class Made(dict[str, tuple[Decision, "QuantizedLinear | QuantizedEmbedding | None"]]):
    """By name: the decision that was carried out, and the layer; None where the model keeps what it has."""


def make(
    site: Site, decision: Decision, kernel: KernelName, layers: Mapping[str, type[QuantizedLinear]], made: Made
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
        dress(layer, site)
        sqnr = first.weight_sqnr_db if first else weight_sqnr_db(float_weight(module), layer.int8_weights, layer.scales)
        decision = replace(decision, weight_sqnr_db=sqnr)
    made[decision.name] = decision, layer


def dress(layer: nn.Module, site: Site) -> None:
    """Give ``layer`` the hooks, the mode and the users' own attributes of the layer it stands for."""
    for name, value in vars(site.original).items():
        if name in _HOOKS or (name not in vars(layer) and name != "_compiled_call_impl"):
            vars(layer)[name] = value
    layer.train(site.training)


def refuse_root(model: nn.Module) -> None:
    """Refuse a model that is itself a layer: nothing holds it in which another could take its place.

    Raises:
        ModelError: it is one.
    """
    if is_layer(model):
        raise ModelError(
            f"the model is itself an nn.{type(model).__name__}, which cannot be replaced in place: put it in an "
            "nn.Sequential, or use replace_linear_with_target_and_quantize, which returns the new layer"
        )
