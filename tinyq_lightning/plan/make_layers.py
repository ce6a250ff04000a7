"""The quantized layer that takes the place of a float one, with all that its user hung on that."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from tinyq_lightning.errors import ModelError
from tinyq_lightning.kernels import quantize_per_row_with_sqnr
from tinyq_lightning.layers import LAYERS, Int8Weight, QuantizedEmbedding, QuantizedLinear, float_weight
from tinyq_lightning.plan.plan import Plan
from tinyq_lightning.plan.sites import Site, is_layer

__all__ = [
    "QuantizedLayers",
    "dress",
    "refuse_root",
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


class QuantizedLayers:
    """The quantized layers of a plan, made one by one. Making one changes nothing in the model.

    Args:
        plan: as it was resolved.
    """

    def __init__(self, plan: Plan) -> None:
        self._spec = plan.spec
        self._decisions = {decision.name: decision for decision in plan}
        self._made: dict[str, tuple[Int8Weight, float]] = {}

    @property
    def plan(self) -> Plan:
        """The plan with the SQNR of each weight that has been quantized."""
        return Plan(tuple(self._decisions.values()), self._spec)

    def make(self, site: Site) -> QuantizedLinear | QuantizedEmbedding | None:
        """The layer that takes the place of ``site``; None where the model keeps what it has.

        Those that share their weight get the codes of the first of them, which is to be made before.
        """
        module, decision = site.module, self._decisions[site.name]
        if decision.method == "float" or isinstance(module, Int8Weight):
            return None
        assert isinstance(module, nn.Linear | nn.Embedding)
        made = self._made[decision.tied_to] if decision.tied_to else _quantized(float_weight(module))
        codes, sqnr = self._made[site.name] = made
        layer: QuantizedLinear | QuantizedEmbedding
        if isinstance(module, nn.Embedding):
            layer = QuantizedEmbedding.from_embedding(module, codes)
        else:
            layer = linear = LAYERS[decision.method].from_linear(module, codes)
            linear.kernel = self._spec.kernel
        dress(layer, site)
        self._decisions[site.name] = replace(decision, weight_sqnr_db=sqnr)
        return layer


def _quantized(weight: Tensor) -> tuple[Int8Weight, float]:
    """Codes and scales for a layer to share, and their SQNR, from one pass over the weight."""
    rows, columns = weight.shape
    codes = Int8Weight(rows, columns, weight.dtype, "meta")
    with torch.inference_mode(False), torch.no_grad():  # buffers that can be trained past later
        codes.int8_weights, codes.scales, sqnr = quantize_per_row_with_sqnr(weight)
    return codes, sqnr


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
