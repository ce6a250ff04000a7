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
from tinyq_lightning.kernels.nibbles import LEAST_CODE, MOST_CODE

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
    weight: Tensor, multipliers: Tensor, scales: Tensor, moments: Moments, centred: bool, damping: float = DAMPING
) -> Tensor:
    """Codes of four bits for given scales under which the outputs change little, on inputs with these moments.

    Args:
        weight: ``[rows, columns]``, any floating dtype.
        multipliers: ``[rows, groups]`` uint8 in 1…15.
        scales: ``[rows]`` float32.
        moments: of the inputs.
        centred: ignore the mean of the outputs' error, which the bias is to make up for.
        damping: see :data:`DAMPING`.

    Returns:
        ``multiplier * code``, ``[rows, columns]`` int8 in -120…105, on the weight's device.
    """
    device = moments.sums.device
    work = torch.float64 if device.type == "cuda" else torch.float32  # a GPU's float32 may be TF32
    factors = code_steps(multipliers, torch.ones_like(scales), weight.shape[1]).to(device)
    held, spread, steps = (
        torch.unflatten(each.detach().to(device, work), 0, (moments.parts, -1))
        for each in (weight, factors, factors * scales.to(device)[:, None])
    )
    codes = torch.empty(held.shape, dtype=torch.int8, device=device)
    for columns, matrix in moments.matrices(centred):
        order = matrix.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
        along = order[:, None, :].expand(-1, held.shape[1], -1)
        values, worth = (each[..., columns].gather(2, along) for each in (held, steps))
        chosen = _in_order(values, worth, _passed_on(_ordered(matrix, order), damping, work))
        codes[..., columns] = torch.empty_like(chosen).scatter_(2, along, chosen)
    return codes.mul_(spread.to(torch.int8)).flatten(0, 1).to(weight.device)


def _ordered(matrix: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of each of some matrices ``[parts, k, k]`` in another order."""
    rows = matrix.gather(1, order[:, :, None].expand_as(matrix))
    return rows.gather(2, order[:, None, :].expand_as(matrix))


def _passed_on(matrix: Tensor, damping: float, work: torch.dtype = torch.float32) -> Tensor:
    """The share of a column's error that each column behind it takes: ``[parts, k, k]``, one on the diagonal.

    These are the rows of the upper Cholesky factor of the damped matrix' inverse, each divided by its diagonal. The
    inverse of the factor from the other end, an upper triangle ``F`` with ``F·Fᵀ`` the matrix, is that very factor.

    Args:
        matrix: ``[parts, k, k]`` float64; it is overwritten.
        damping: see :data:`DAMPING`.
        work: dtype of the result.
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
    upper = factor.flip(1, 2).to(work)  # damped as it is, float32 is enough from here on
    identity = torch.eye(matrix.shape[-1], dtype=work, device=matrix.device).expand_as(upper)
    inverse: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return inverse.div_(inverse.diagonal(dim1=1, dim2=2).clone()[:, :, None])


def _in_order(weight: Tensor, steps: Tensor, passed_on: Tensor) -> Tensor:
    """Round the columns of ``weight`` ``[parts, rows, k]`` from the first to the last; it is overwritten."""
    codes = torch.empty_like(weight, dtype=torch.int8)
    for start in range(0, weight.shape[2], _LAZY_COLUMNS):
        stop = min(start + _LAZY_COLUMNS, weight.shape[2])
        block, errors = weight[..., start:stop].contiguous(), torch.empty_like(weight[..., start:stop])
        for column in range(stop - start):
            value, step = block[..., column], steps[..., start + column]
            code = (value / step).round_().clamp_(LEAST_CODE, MOST_CODE)
            codes[..., start + column] = code
            error = errors[..., column] = value - code * step
            shares = passed_on[:, start + column, start + column + 1 : stop]
            block[..., column + 1 :].baddbmm_(error[..., None], shares[:, None, :], alpha=-1)
        if stop < weight.shape[2]:
            weight[..., stop:].baddbmm_(errors, passed_on[:, start:stop, stop:], alpha=-1)
    return codes
