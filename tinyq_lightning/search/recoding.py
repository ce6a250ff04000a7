"""Codes and biases of layers that share weights, chosen by some moments of their inputs and judged by others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyq_lightning.kernels import (
    Moments,
    dequantize,
    feedback_codes,
    joint_sqnr_db,
    multipliers_of,
    weight_sqnr_db,
)
from tinyq_lightning.layers import Int8Weight, QuantizedLayer, kind_of
from tinyq_lightning.plan import Recoded

__all__ = [
    "Member",
    "recode",
]


@dataclass(frozen=True)
class Member:
    """One of some layers that share weights.

    Attributes:
        name: of the layer.
        module: float.
        layer: quantized.
        moments: of the inputs to choose by and of those to judge by, for each weight.
    """

    name: str
    module: nn.Module
    layer: QuantizedLayer
    moments: Mapping[str, tuple[Moments, Moments]]


@dataclass(frozen=True)
class _Use:
    """A weight as one of some layers uses it."""

    weight: str
    layer: QuantizedLayer
    chosen_by: Moments
    held_out: Moments

    @property
    def bias_name(self) -> str:
        """Of what is added to the products with the weight."""
        return self.weight.replace("weight", "bias", 1)

    @property
    def bias(self) -> Tensor | None:
        """What is added to the products with the weight; None if nothing is."""
        return self.layer._parameters.get(self.bias_name)

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
    """Codes ``[rows, columns]``, and for each use its bias, None for its own, and the error of the products."""

    codes: Tensor
    biases: Sequence[Tensor | None]
    errors: Sequence[float]


@dataclass(frozen=True)
class _Chosen:
    """What was found for a weight.

    Attributes:
        codes: None: they stay.
        weight: ``[rows, columns]``, float.
        scales: ``[rows]``.
        before: the error of the products without calibration, for each use.
        best: with it.
    """

    codes: Int8Weight | None
    weight: Tensor
    scales: Tensor
    before: _Tried
    best: _Tried

    def sqnr_db(self) -> float:
        """Of the codes, those that stay too."""
        return weight_sqnr_db(self.weight, self.best.codes, self.scales)


def recode(members: Sequence[Member]) -> dict[str, Recoded]:
    """Other codes and biases for layers that share weights, if they make the error of each on held-out inputs smaller.

    Each weight is chosen for alone. The error of a layer is that of the products with all its weights.

    Args:
        members: their weights are in the same order.

    Returns:
        By the name of the layer.
    """
    with torch.inference_mode(False), torch.no_grad():  # buffers that can be trained past later
        uses = list(zip(*map(_uses, members), strict=True))
        chosen = [_chosen(members[0], each) for each in uses]
        sqnr_db = None
        if any(made.codes is not None for made in chosen):
            weights = list(_weights(members[0]).values())
            sqnr_db = joint_sqnr_db(weights, [made.sqnr_db() for made in chosen])
    found = {}
    for index, member in enumerate(members):
        codes = {use[index].weight: made.codes for use, made in zip(uses, chosen, strict=True) if made.codes}
        biases = {
            use[index].bias_name: bias
            for use, made in zip(uses, chosen, strict=True)
            if (bias := made.best.biases[index]) is not None
        }
        before = sum(each.before.errors[index] for each in chosen)
        now = sum(each.best.errors[index] for each in chosen)
        found[member.name] = Recoded(codes, biases, sqnr_db, now / before if before else 1.0)
    return found


def _uses(member: Member) -> list[_Use]:
    return [_Use(weight, member.layer, *both) for weight, both in member.moments.items()]


def _weights(member: Member) -> Mapping[str, Tensor]:
    kind = kind_of(member.layer)
    assert kind is not None
    return kind.float_weights(member.module)


def _chosen(first: Member, uses: Sequence[_Use]) -> _Chosen:
    """What is best for a weight that the layers use so; ``first`` is the first of them."""
    name, kind = uses[0].weight, kind_of(first.layer)
    assert kind is not None
    size, held = kind.sizes(first.layer)[name], first.layer.coded_weights()[name]
    weight = size.to_rows(_weights(first)[name]).detach()
    codes, scales, multipliers = size.to_rows(held.int8_weights), held.scales, held.multipliers

    def judged(codes: Tensor) -> tuple[_Tried, _Tried]:
        return _judged(uses, codes, dequantize(codes, scales, torch.float32) - weight.float())

    before, corrected = judged(codes)
    centred = all(each.bias is not None for each in uses)
    each_group = multipliers_of(multipliers, weight.shape[1])
    chosen = feedback_codes(weight, each_group, scales, _together(uses), centred)
    best = before
    for tried in (corrected, judged(chosen)[1]):
        no_worse = all(now <= then for now, then in zip(tried.errors, before.errors, strict=True))
        best = tried if no_worse and _total(uses, tried) < _total(uses, best) else best
    made = None
    if best.codes is chosen:
        made = Int8Weight(0, 0, held.dtype, "meta").take_codes(size.from_rows(chosen), scales, multipliers)
    return _Chosen(made, weight, scales, before, best)


def _judged(uses: Sequence[_Use], codes: Tensor, change: Tensor) -> tuple[_Tried, _Tried]:
    """Codes with the biases as they are, and with those of uses corrected whose error gets smaller by that."""
    biases = [each.corrected(change) for each in uses]
    errors = [each.errors(change, bias) for each, bias in zip(uses, biases, strict=True)]
    kept = [bias if after < before else None for bias, (before, after) in zip(biases, errors, strict=True)]
    return (
        _Tried(codes, [None] * len(uses), [before for before, _ in errors]),
        _Tried(codes, kept, [min(pair) for pair in errors]),
    )


def _together(uses: Sequence[_Use]) -> Moments:
    """The moments of the inputs of all uses."""
    if len(uses) == 1:
        return uses[0].chosen_by
    parts = max(each.chosen_by.parts for each in uses)
    total = uses[0].chosen_by.in_parts(parts)
    for each in uses[1:]:
        total.add_all(each.chosen_by)
    return total


def _total(uses: Sequence[_Use], tried: _Tried) -> float:
    """The error over all inputs of all uses."""
    counts = (float(each.held_out.counts.sum()) / each.held_out.parts for each in uses)
    return sum(count * error for count, error in zip(counts, tried.errors, strict=True))
