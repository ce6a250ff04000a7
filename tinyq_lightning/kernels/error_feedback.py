"""Codes chosen with the second moments of a layer's inputs: each rounding error is made up for by columns to come.

The method is GPTQ (Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", 2022): columns are rounded one after the other, and after each, those that are not rounded
yet move to where they change the outputs least. Scales are given and stay, so that the order of columns is free: those
with the largest inputs come first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinyq_lightning.kernels.four_bits import code_steps
from tinyq_lightning.kernels.moments import Moments
from tinyq_lightning.kernels.nibbles import LEAST_CODE, MOST_CODE, multipliers_of
from tinyq_lightning.kernels.weights import CODE_MAX

__all__ = [
    "DAMPING",
    "feedback_codes",
]

DAMPING = 0.05
"""Added to the moments' diagonal, as a share of its mean. The paper has 0.01; with the few inputs of some validation
batches, 0.05 leaves less error on others (a text encoder, a network for DNA and one for digits)."""


# Columns whose errors are gathered before they are passed on to all columns behind them.
_LAZY_COLUMNS = 128


def feedback_codes(
    weight: Tensor,
    scales: Tensor,
    multipliers: Tensor | None,
    moments: Moments,
    centred: bool,
    damping: float = DAMPING,
) -> Tensor:
    """Codes for given scales under which the outputs change little, on inputs with these moments.

    Args:
        weight: ``[rows, columns]``, any floating dtype.
        scales: ``[rows]`` float32.
        multipliers: ``[rows, ceil(groups / 2)]`` uint8, packed, of a weight of four bits; else None.
        moments: of the inputs.
        centred: ignore the mean of the outputs' error, which the bias is to make up for.
        damping: see :data:`DAMPING`.

    Returns:
        ``[rows, columns]`` int8, on the weight's device; of a weight of four bits ``multiplier * code``.
    """
    spread, limits = None, (-CODE_MAX, CODE_MAX)
    steps = scales[:, None]
    if multipliers is not None:
        columns, limits = weight.shape[1], (LEAST_CODE, MOST_CODE)
        spread = code_steps(multipliers_of(multipliers, columns), torch.ones_like(scales), columns)
        steps = spread * steps
    codes = _codes(weight.detach(), steps, moments, limits, centred, damping).to(weight.device)
    return codes if spread is None else codes.mul_(spread.to(torch.int8))


def _codes(
    weight: Tensor, steps: Tensor, moments: Moments, limits: tuple[int, int], centred: bool, damping: float
) -> Tensor:
    """Codes within ``limits``, each worth its step, which broadcasts to the weight ``[rows, columns]``."""
    device, parts = moments.sums.device, moments.parts
    held = torch.unflatten(weight.to(device, torch.float32), 0, (parts, -1))
    worth = torch.unflatten(steps.to(device).expand(weight.shape), 0, (parts, -1))
    codes = torch.empty(held.shape, dtype=torch.int8, device=device)
    for columns, matrix in moments.matrices(centred):
        order = matrix.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
        along = order[:, None, :].expand(-1, held.shape[1], -1)
        chosen = _in_order(
            held[..., columns].gather(2, along),
            worth[..., columns].gather(2, along),
            _passed_on(_ordered(matrix, order), damping),
            limits,
        )
        codes[..., columns] = torch.empty_like(chosen).scatter_(2, along, chosen)
    return codes.flatten(0, 1)


def _ordered(matrix: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of each of some matrices ``[parts, k, k]`` in another order."""
    rows = matrix.gather(1, order[:, :, None].expand_as(matrix))
    return rows.gather(2, order[:, None, :].expand_as(matrix))


def _passed_on(matrix: Tensor, damping: float) -> Tensor:
    """The share of a column's error that each column behind it takes: ``[parts, k, k]`` float32, one on the diagonal.

    These are the rows of the upper Cholesky factor of the damped matrix' inverse, each divided by its diagonal. The
    inverse of the factor from the other end, an upper triangle ``F`` with ``F·Fᵀ`` the matrix, is that very factor.

    Args:
        matrix: ``[parts, k, k]`` float64; it is overwritten.
        damping: see :data:`DAMPING`.
    """
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    added = damping * torch.where(mean > 0, mean, torch.ones_like(mean))
    while True:
        diagonal += added
        factor, failed = torch.linalg.cholesky_ex(matrix.flip(1, 2))
        if not bool(failed.any()):
            break
        added = 2 * added  # sums in float32 may leave less than the damping makes up for
    upper = factor.flip(1, 2)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
    inverse: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return inverse.div_(inverse.diagonal(dim1=1, dim2=2).clone()[:, :, None]).float()


def _in_order(weight: Tensor, steps: Tensor, passed_on: Tensor, limits: tuple[int, int]) -> Tensor:
    """Round the columns of ``weight`` ``[parts, rows, k]`` from the first to the last; it is overwritten."""
    codes = torch.empty_like(weight, dtype=torch.int8)
    for start in range(0, weight.shape[2], _LAZY_COLUMNS):
        stop = min(start + _LAZY_COLUMNS, weight.shape[2])
        block, errors = weight[..., start:stop].contiguous(), torch.empty_like(weight[..., start:stop])
        for column in range(stop - start):
            value, step = block[..., column], steps[..., start + column]
            code = (value / step).round_().clamp_(*limits)
            codes[..., start + column] = code
            error = errors[..., column] = value - code * step
            shares = passed_on[:, start + column, start + column + 1 : stop]
            block[..., column + 1 :].baddbmm_(error[..., None], shares[:, None, :], alpha=-1)
        if stop < weight.shape[2]:
            weight[..., stop:].baddbmm_(errors, passed_on[:, start:stop, stop:], alpha=-1)
    return codes
