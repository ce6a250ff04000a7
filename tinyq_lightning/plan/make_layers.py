"""The quantized layer that takes the place of a float one, with the hooks and attributes that its user gave that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from tinyq_lightning.kernels import joint_sqnr_db, quantize_groups_with_sqnr, quantize_per_row_with_sqnr
from tinyq_lightning.layers import Int8Weight, QuantizedLayer, WeightSize, static_functions, without_weight_hooks
from tinyq_lightning.methods import METHODS
from tinyq_lightning.plan.plan import Plan
from tinyq_lightning.plan.sites import Site

__all__ = [
    "QuantizedLayers",
    "carry_over",
    "quantized_weights",
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
_OF_THE_FLOAT_LAYER = {"_compiled_call_impl", "_load_hook"}


class QuantizedLayers:
    """The quantized layers of a plan, made one by one. Making one changes nothing in the model.

    Args:
        plan: as it was resolved.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._decisions = {decision.name: decision for decision in plan}
        self._made: dict[str, tuple[Mapping[str, Int8Weight], float]] = {}

    def let_go(self) -> None:
        """Hold no codes any more: what is made from here on shares none with what was made before."""
        self._made.clear()

    @property
    def plan(self) -> Plan:
        """The plan with the SQNR of each weight that has been quantized."""
        return replace(self._plan, decisions=tuple(self._decisions.values()))

    def make(self, site: Site) -> QuantizedLayer | None:
        """The layer that takes the place of ``site``; None if the model keeps what it has.

        Layers that share their weights get the codes of the first of them, which must be made before the others.
        """
        decision = self._decisions[site.name]
        if decision.method == "float" or site.is_quantized:
            return None
        if decision.tied_to:
            shared, sqnr = self._made[decision.tied_to]
            codes: Mapping[str, Int8Weight] = dict(zip(site.weights, shared.values(), strict=True))
        else:
            codes, sqnr = quantized_weights(site, METHODS[decision.method].bits)
        self._made[site.name] = codes, sqnr
        layer = site.kind.make(site.module, codes, decision.method, self._plan.spec.kernel)
        carry_over(site, layer)
        self._decisions[site.name] = replace(decision, weight_sqnr_db=sqnr)
        return layer


def quantized_weights(site: Site, bits: int = 8) -> tuple[dict[str, Int8Weight], float]:
    """Codes and scales of each weight for a layer to share, and the SQNR in dB of all of them together.

    Args:
        site: the float layer.
        bits: of a code: 8 or 4.
    """
    weights, sizes = site.kind.float_weights(site.module), site.sizes
    made = {name: _quantized(weight, sizes[name], bits) for name, weight in weights.items()}
    sqnr_db = joint_sqnr_db([*weights.values()], [sqnr for _, sqnr in made.values()])
    return {name: codes for name, (codes, _) in made.items()}, sqnr_db


def _quantized(weight: Tensor, size: WeightSize, bits: int) -> tuple[Int8Weight, float]:
    """Codes and scales of one weight, and their SQNR, from one pass over it."""
    codes = Int8Weight(0, 0, weight.dtype, "meta")
    with torch.inference_mode(False), torch.no_grad():  # buffers that can be trained past later
        multipliers, rows = None, size.to_rows(weight)
        if bits == 4:
            made, multipliers, scales, sqnr = quantize_groups_with_sqnr(rows)
        else:
            made, scales, sqnr = quantize_per_row_with_sqnr(rows)
        return codes.take_codes(size.from_rows(made), scales, multipliers), sqnr


def carry_over(site: Site, layer: nn.Module) -> None:
    """Give ``layer`` the hooks, the mode, and the user's attributes and buffers of the layer it stands for."""
    original, left_behind = site.original, site.kind.left_behind | _OF_THE_FLOAT_LAYER | site.computed_from
    held = {**static_functions(original), **vars(original), "_forward_pre_hooks": without_weight_hooks(original)}
    for name, value in held.items():
        if name in _HOOKS or (name not in vars(layer) and name not in left_behind):
            vars(layer)[name] = value
    for name, buffer in original._buffers.items():
        if name not in left_behind:
            layer.register_buffer(name, buffer, persistent=name not in original._non_persistent_buffers_set)
    layer.train(site.training)
