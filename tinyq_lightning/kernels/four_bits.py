"""Weight quantization math for four bits: scales, multipliers and codes of the least squared error.

``weight ≈ scale * multiplier * code``, as :mod:`~tinyq_lightning.kernels.nibbles` has it. The largest value alone would
give a scale that is too coarse for the others. So scales are tried: first the step of each group, as if it had a scale
of its own; then the scale of each row, of which the steps of its groups have to be whole multiples. On real weights
this comes within a quarter of a decibel of float scales a group (Frantar et al., "GPTQ", 2022, and others search for
the scales of groups in the same way).

Sums are made in a fixed order, so that all processors and any number of threads choose the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinyq_lightning.errors import ModelError
from tinyq_lightning.kernels.nibbles import (
    GROUP,
    LARGEST_MULTIPLIER,
    LEAST_CODE,
    MOST_CODE,
    collapse,
    group_count,
    pack_nibbles,
)
from tinyq_lightning.kernels.weights import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    count_non_finite,
    divisor,
    refuse_unfit,
    row_blocks,
    weight_sqnr_db,
)

__all__ = [
    "choose_group_scales",
    "code_steps",
    "group_codes",
    "quantize_groups",
    "quantize_groups_expanded",
    "quantize_groups_with_sqnr",
]

# Steps of a group that are tried, in parts of its largest value: from clipping it by a quarter to not at all.
_STEPS = tuple(part / MOST_CODE for part in (0.7, 0.775, 0.85, 0.925, 1.0))


# Scales of a row that are tried, in parts of the one that gives its largest step the largest multiplier.
_SCALES = (0.95, 1.0, 1.05, 1.1)


# Tried around the multiplier that is nearest to a group's own step.
_AROUND = (-1, 1)


def quantize_groups(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight matrix to four bits: as it is written to a file.

    The work is done in blocks of rows, so memory beyond the input and the output stays small.

    Args:
        weight: ``[out, in]``, any floating dtype, any device.

    Returns:
        int4_weights: ``[out, ceil(in / 2)]`` uint8: codes, two a byte.
        multipliers: ``[out, ceil(groups / 2)]`` uint8: of groups of 32 inputs, two a byte.
        scales: ``[out]`` float32, positive.

    Raises:
        ModelError: the weight is not a floating matrix, is on the meta device, or holds values that are not finite in
            float32 (the message tells how many).
    """
    codes, multipliers, scales = quantize_groups_expanded(weight)
    return collapse(codes, multipliers), multipliers, scales


def quantize_groups_expanded(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`quantize_groups`, with ``multiplier * code`` for each weight: as kernels multiply by it.

    Returns:
        codes: ``[out, in]`` int8 in -120…105.
        multipliers: ``[out, ceil(groups / 2)]`` uint8, packed.
        scales: ``[out]`` float32, positive.
    """
    multipliers, scales = choose_group_scales(weight)
    return group_codes(weight, multipliers, scales), pack_nibbles(multipliers), scales


def quantize_groups_with_sqnr(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """As :func:`quantize_groups_expanded`, and the SQNR in dB."""
    codes, multipliers, scales = quantize_groups_expanded(weight)
    return codes, multipliers, scales, weight_sqnr_db(weight, codes, scales)


def choose_group_scales(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Multipliers and scales whose nearest codes have the least squared error, of those that are tried.

    Args:
        weight: ``[out, in]``, as for :func:`quantize_groups`.

    Returns:
        multipliers: ``[out, groups]`` uint8 in 1…15.
        scales: ``[out]`` float32, positive.

    Raises:
        ModelError: as :func:`quantize_groups`.
    """
    refuse_unfit(weight)
    weight, rows = weight.detach(), weight.shape[0]
    multipliers = torch.ones(rows, group_count(weight.shape[1]), dtype=torch.uint8, device=weight.device)
    scales = torch.full((rows,), SMALLEST_SCALE, dtype=torch.float32, device=weight.device)
    for block, factors, scale in row_blocks(weight, multipliers, scales):
        block = block.to(torch.float32)
        largest = block.abs().amax(1).clamp_min_(SMALLEST_SCALE)
        chosen, found = _least_error(_in_groups(block / largest[:, None]), SMALLEST_SCALE / largest)
        factors.copy_(chosen)
        scale.copy_(largest.mul_(found))
    if not torch.isfinite(scales).all():
        bad = count_non_finite(weight)
        raise ModelError(f"{bad} of {weight.numel()} weights are not finite (NaN, infinite, or beyond float32)")
    return multipliers, scales.clamp_(SMALLEST_SCALE, LARGEST_SCALE)


def group_codes(weight: Tensor, multipliers: Tensor, scales: Tensor) -> Tensor:
    """The nearest codes for given scales, times their multipliers.

    Args:
        weight: ``[out, in]``, floating.
        multipliers: ``[out, groups]`` uint8 in 1…15.
        scales: ``[out]`` float32.

    Returns:
        ``[out, in]`` int8 in -120…105.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for block, factors, scale, out in row_blocks(weight.detach(), multipliers, scales, codes):
        spread = _spread(factors, block.shape[1])
        near = block.to(torch.float32) / spread.mul(scale[:, None])
        out.copy_(near.round_().clamp_(LEAST_CODE, MOST_CODE).mul_(spread))
    return codes


def code_steps(multipliers: Tensor, scales: Tensor, columns: int) -> Tensor:
    """What one step of each weight's code is worth.

    Args:
        multipliers: ``[out, groups]`` uint8 in 1…15.
        scales: ``[out]`` float32.
        columns: of the weight.

    Returns:
        ``[out, columns]`` float32: ``scale * multiplier``.
    """
    return _spread(multipliers, columns).mul_(scales[:, None])


def _spread(multipliers: Tensor, columns: int) -> Tensor:
    """The multiplier of each weight: ``[rows, groups]`` → ``[rows, columns]`` float32."""
    return multipliers.float().repeat_interleave(GROUP, 1)[:, :columns].contiguous()


def _in_groups(block: Tensor) -> Tensor:
    """``[rows, columns]`` → ``[GROUP, rows * groups]``: what is done to all groups at once runs along memory."""
    missing = -block.shape[1] % GROUP
    block = nn.functional.pad(block, (0, missing)) if missing else block
    return block.reshape(-1, GROUP).t().contiguous()


def _least_error(values: Tensor, smallest: Tensor) -> tuple[Tensor, Tensor]:
    """Multipliers ``[rows, groups]`` and scales ``[rows]`` for values ``[GROUP, rows * groups]`` of at most 1.

    No scale is below ``smallest`` ``[rows]``: what is the smallest normal float in the weight's own unit.
    """
    wanted, rows = _group_steps(values), len(smallest)
    groups = len(wanted) // rows
    most = wanted.view(rows, groups).amax(1).div_(divisor(wanted, LARGEST_MULTIPLIER))
    least = torch.full_like(most, torch.inf)
    scales, multipliers, errors = most, torch.ones_like(wanted), torch.zeros_like(wanted)
    for part in _SCALES:
        tried = torch.maximum(most * part, smallest)
        steps = _each_group(tried, groups)
        nearest = (wanted / steps).round_().clamp_(1, LARGEST_MULTIPLIER)
        error = _error(values, steps * nearest)
        total = _sum_in_order(error.view(rows, groups).t())
        better = total < least
        least, scales = torch.where(better, total, least), torch.where(better, tried, scales)
        of_groups = _each_group(better, groups)
        multipliers, errors = torch.where(of_groups, nearest, multipliers), torch.where(of_groups, error, errors)
    steps, nearest = _each_group(scales, groups), multipliers
    for distance in _AROUND:
        other = (nearest + distance).clamp_(1, LARGEST_MULTIPLIER)
        error = _error(values, steps * other)
        better = error < errors
        errors, multipliers = torch.where(better, error, errors), torch.where(better, other, multipliers)
    return multipliers.view(rows, groups), scales


def _group_steps(values: Tensor) -> Tensor:
    """The step of each group that has the least error of those tried: ``[GROUP, n]`` → ``[n]``."""
    largest = values.abs().amax(0)
    least, best = torch.full_like(largest, torch.inf), torch.zeros_like(largest)
    for part in _STEPS:
        steps = largest * part
        error = _error(values, steps)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, steps, best)
    return best


def _each_group(of_rows: Tensor, groups: int) -> Tensor:
    return of_rows[:, None].expand(-1, groups).reshape(-1)


def _error(values: Tensor, steps: Tensor) -> Tensor:
    """The squared error of each group by its nearest codes: ``[GROUP, n]`` and steps ``[n]`` → ``[n]``."""
    quotients = values / steps.clamp_min(SMALLEST_SCALE)
    rest = quotients.sub_(quotients.round().clamp_(LEAST_CODE, MOST_CODE))
    return _sum_in_order(rest.square_()).mul_(steps).mul_(steps)


def _sum_in_order(parts: Tensor) -> Tensor:
    """The sum over the first dimension, by halves: the same bits on every machine. ``parts`` may be overwritten."""
    while len(parts) > 1:
        half = len(parts) // 2
        rest = parts[2 * half :]
        parts = torch.cat((parts[:half] + parts[half : 2 * half], rest)) if len(rest) else parts[:half] + parts[half:]
    return parts[0]
