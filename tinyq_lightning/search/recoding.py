"""Codes and biases of layers that share a weight, chosen by some moments of their inputs and judged by others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyq_lightning.kernels import Moments, dequantize, feedback_codes, multipliers_of, weight_sqnr_db
from tinyq_lightning.layers import Int8Weight, QuantizedLayer, kind_of
from tinyq_lightning.plan import Recoded

__all__ = [
    "Member",
    "recode",
]


@dataclass(frozen=True)
class Member:
    """One of some layers that share a weight.

    Attributes:
        name: of the layer.
        module: float.
        layer: quantized.
        chosen_by: moments of the inputs to choose by.
        held_out: moments of the inputs to judge by.
    """

    name: str
    module: nn.Module
    layer: QuantizedLayer
    chosen_by: Moments
    held_out: Moments

    @property
    def bias(self) -> Tensor | None:
        """Of the layer; None if it has none."""
        return self.layer._parameters.get("bias")

    def corrected(self, change: Tensor) -> Tensor | None:
        """The bias that makes up for the mean error of the outputs under a change of the weight ``[rows, columns]``."""
        if self.bias is None:
            return None
        return (self.bias.detach().double() - self.chosen_by.mean_change(change).to(self.bias.device)).to(
            self.bias.dtype
        )

    def errors(self, change: Tensor, bias: Tensor | None) -> list[float]:
        """Of the outputs on the inputs that were held out: with the layer's own bias, and with another."""
        if bias is None or self.bias is None:
            return 2 * self.held_out.output_errors(change)
        moved = bias.double() - self.bias.detach().double()
        return self.held_out.output_errors(change, [None, moved])


@dataclass(frozen=True)
class _Tried:
    """Codes ``[rows, columns]``, and for each member its bias, None for its own, and the error of its outputs."""

    codes: Tensor
    biases: Sequence[Tensor | None]
    errors: Sequence[float]


def recode(members: Sequence[Member]) -> dict[str, Recoded]:
    """Other codes and biases for layers that share a weight, if they make the error of each on held-out inputs smaller.

    Args:
        members: their moments are of the inputs of each.

    Returns:
        By the name of the layer.
    """
    with torch.inference_mode(False), torch.no_grad():  # buffers that can be trained past later
        return _recode(members)


def _recode(members: Sequence[Member]) -> dict[str, Recoded]:
    first = members[0]
    kind, held = kind_of(first.layer), next(iter(first.layer.coded_weights().values()))
    assert kind is not None
    size = kind.sizes(first.layer)["weight"]
    weight = size.to_rows(next(iter(kind.float_weights(first.module).values()))).detach()
    codes, scales, multipliers = size.to_rows(held.int8_weights), held.scales, held.multipliers

    def judged(codes: Tensor) -> tuple[_Tried, _Tried]:
        return _judged(members, codes, dequantize(codes, scales, torch.float32) - weight.float())

    before, corrected = judged(codes)
    centred = all(each.bias is not None for each in members)
    each_group = multipliers_of(multipliers, weight.shape[1])
    chosen = feedback_codes(weight, each_group, scales, _together(members), centred)
    best = before
    for tried in (corrected, judged(chosen)[1]):
        no_worse = all(now <= then for now, then in zip(tried.errors, before.errors, strict=True))
        best = tried if no_worse and _total(members, tried) < _total(members, best) else best
    if best is before:
        return {each.name: Recoded(output_error=1.0) for each in members}
    made = sqnr = None
    if best.codes is chosen:
        made = Int8Weight(0, 0, held.dtype, "meta").take_codes(size.from_rows(chosen), scales, multipliers)
        sqnr = weight_sqnr_db(weight, chosen, scales)
    shares = [now / then if then else 1.0 for now, then in zip(best.errors, before.errors, strict=True)]
    return {
        each.name: Recoded(made, bias, sqnr, share)
        for each, bias, share in zip(members, best.biases, shares, strict=True)
    }


def _judged(members: Sequence[Member], codes: Tensor, change: Tensor) -> tuple[_Tried, _Tried]:
    """Codes with the biases as they are, and with those of members corrected whose error gets smaller by that."""
    biases = [each.corrected(change) for each in members]
    errors = [each.errors(change, bias) for each, bias in zip(members, biases, strict=True)]
    kept = [bias if after < before else None for bias, (before, after) in zip(biases, errors, strict=True)]
    return (
        _Tried(codes, [None] * len(members), [before for before, _ in errors]),
        _Tried(codes, kept, [min(pair) for pair in errors]),
    )


def _together(members: Sequence[Member]) -> Moments:
    """The moments of the inputs of all members."""
    if len(members) == 1:
        return members[0].chosen_by
    parts = max(each.chosen_by.parts for each in members)
    total = members[0].chosen_by.in_parts(parts)
    for each in members[1:]:
        total.add_all(each.chosen_by)
    return total


def _total(members: Sequence[Member], tried: _Tried) -> float:
    """The error over all inputs of all members."""
    counts = (float(each.held_out.counts.sum()) / each.held_out.parts for each in members)
    return sum(count * error for count, error in zip(counts, tried.errors, strict=True))
