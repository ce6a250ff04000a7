"""The quantized layer that takes the place of a float one, with the hooks and attributes that its user gave that."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from tinyq_lightning.kernels import quantize_per_row_with_sqnr
from tinyq_lightning.layers import Int8Weight, float_weight
from tinyq_lightning.plan.plan import Plan
from tinyq_lightning.plan.sites import Site

__all__ = [
    "QuantizedLayers",
    "carry_over",
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


# What torch makes for one module, and what a class that is no nn.Linear keeps for its own state dict.
_OF_THE_FLOAT_LAYER = ("_compiled_call_impl", "_load_hook")


class QuantizedLayers:
    """The quantized layers of a plan, made one by one. Making one changes nothing in the model.

    Args:
        plan: as it was resolved.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._decisions = {decision.name: decision for decision in plan}
        self._made: dict[str, tuple[Int8Weight, float]] = {}

    @property
    def plan(self) -> Plan:
        """The plan with the SQNR of each weight that has been quantized."""
        return replace(self._plan, decisions=tuple(self._decisions.values()))

    def make(self, site: Site) -> Int8Weight | None:
        """The layer that takes the place of ``site``; None if the model keeps what it has.

        Layers that share their weight get the codes of the first of them, which must be made before the others.
        """
        decision = self._decisions[site.name]
        if decision.method == "float" or site.is_quantized:
            return None
        made = self._made[decision.tied_to] if decision.tied_to else _quantized(float_weight(site.module))
        codes, sqnr = self._made[site.name] = made
        layer = site.kind.make(site.module, codes, decision.method, self._plan.spec.kernel)
        carry_over(site, layer)
        self._decisions[site.name] = replace(decision, weight_sqnr_db=sqnr)
        return layer


def _quantized(weight: Tensor) -> tuple[Int8Weight, float]:
    """Codes and scales for a layer to share, and their SQNR, from one pass over the weight."""
    rows, columns = weight.shape
    codes = Int8Weight(rows, columns, weight.dtype, "meta")
    with torch.inference_mode(False), torch.no_grad():  # buffers that can be trained past later
        codes.int8_weights, codes.scales, sqnr = quantize_per_row_with_sqnr(weight)
    return codes, sqnr


def carry_over(site: Site, layer: nn.Module) -> None:
    """Give ``layer`` the hooks, the mode, and the user's attributes and buffers of the layer it stands for."""
    original = site.original
    for name, value in vars(original).items():
        if name in _HOOKS or (name not in vars(layer) and name not in _OF_THE_FLOAT_LAYER):
            vars(layer)[name] = value
    for name, buffer in original._buffers.items():
        layer.register_buffer(name, buffer, persistent=name not in original._non_persistent_buffers_set)
    layer.train(site.training)
