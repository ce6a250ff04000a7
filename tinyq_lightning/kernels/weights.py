"""Weight quantization math: pure functions on tensors, symmetric int8 with one scale per output row.

The scheme is the usual one for weights (Jacob et al., "Quantization and Training of Neural Networks
for Efficient Integer-Arithmetic-Only Inference", 2018; Krishnamoorthi's whitepaper, 2018, section
3.1): per output channel, zero point 0, codes in the restricted range -127…127.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tinyq_lightning.errors import ModelError
from tinyq_lightning.kernels.tracing import in_transform

__all__ = [
    "CODE_MAX",
    "LARGEST_SCALE",
    "SMALLEST_SCALE",
    "activation_steps",
    "count_non_finite",
    "dequantize",
    "divisor",
    "joint_sqnr_db",
    "predicted_sqnr_db",
    "quantize_per_row",
    "quantize_per_row_with_sqnr",
    "quantize_rows_to_steps",
    "refuse_unfit",
    "row_blocks",
    "spread_scales",
    "weight_sqnr_db",
]

CODE_MAX = 127
"""Largest code. -128 is never used, so that the range is symmetric and negation is exact."""


# Work happens in blocks of about this many weights: fewer, and calling the operators costs as much as their work;
# more, and a block leaves the cache between one operator and the next.
_BLOCK_WEIGHTS = 131_072


SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""The smallest normal float32. A scale below it would be subnormal, too coarse to divide by."""


LARGEST_SCALE = torch.finfo(torch.float32).max / CODE_MAX * (1 - torch.finfo(torch.float32).eps)
"""The largest scale that does not overflow float32 when it is multiplied by 127 again."""


def _block_rows(weight: Tensor) -> int:
    blocks = max(1, round(weight.numel() / _BLOCK_WEIGHTS))
    return max(1, math.ceil(weight.shape[0] / blocks))


def row_blocks(weight: Tensor, *beside: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of rows, with the same rows of what lies beside; none where there is no weight."""
    if weight.numel() == 0:
        return iter(())
    return zip(*(torch.split(each, _block_rows(weight)) for each in (weight, *beside)), strict=True)


def _buffer(weight: Tensor) -> Tensor:
    """Memory for one block of rows in float32."""
    return torch.empty(_block_rows(weight), weight.shape[1], dtype=torch.float32, device=weight.device)


def quantize_per_row(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight matrix to int8, symmetrically, one scale per output row.

    ``scale = max|row| / 127`` in float32, whatever the dtype of the weight, and
    ``code = round(w / scale)``, ties to even. A row of zeros gets the smallest normal float32 as its
    scale and dequantizes to zeros. The work is done in blocks of rows, so memory beyond the input and
    the output stays small.

    Args:
        weight: ``[out, in]``, any floating dtype, any device.

    Returns:
        codes: ``[out, in]`` int8 in -127…127.
        scales: ``[out]`` float32, positive.

    Raises:
        ModelError: the weight is not a floating matrix, is on the meta device, or holds values that
            are not finite in float32 (the message tells how many).
    """
    weight, codes, scales = _with_outputs(weight)
    for quotients, out in _quotients(weight, scales, codes):
        out.copy_(quotients.round_())
    return codes, _finished(scales, weight)


def quantize_per_row_with_sqnr(weight: Tensor) -> tuple[Tensor, Tensor, float]:
    """As :func:`quantize_per_row`, and :func:`weight_sqnr_db` of the result from the same pass over the weight."""
    weight, codes, scales = _with_outputs(weight)
    rounded, sqnr = _buffer(weight), _Sqnr(weight)
    for quotients, out in _quotients(weight, scales, codes):
        whole = torch.round(quotients, out=rounded[: len(out)])
        out.copy_(whole)
        sqnr.add(quotients, whole)
    return codes, _finished(scales, weight), sqnr.db(scales)


def refuse_unfit(weight: Tensor) -> None:
    """Refuse what cannot be quantized whatever its values are.

    Raises:
        ModelError: the weight is not a floating matrix, or is on the meta device.
    """
    if weight.dim() != 2:
        raise ModelError(f"a weight must have shape [out, in], this one has {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise ModelError(f"a weight must be floating point to be quantized, this one is {weight.dtype}")
    if weight.is_meta:
        raise ModelError("the weight is on the meta device and has no values: load the model before quantizing it")


def _with_outputs(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    refuse_unfit(weight)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.full((len(weight), 1), SMALLEST_SCALE, dtype=torch.float32, device=weight.device)
    return weight.detach(), codes, scales


def _quotients(weight: Tensor, scales: Tensor, codes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each block of rows over its scales, which are filled in, and the place of its codes.

    The quotients of one block lie where those of the next will be.
    """
    buffer = _buffer(weight)
    for block, scale, out in row_blocks(weight, scales, codes):
        block = block.to(torch.float32).contiguous()
        # the greatest and the least are only read; absolute values would have to be written before they are
        torch.maximum(block.amax(1, True), block.amin(1, True).neg_(), out=scale)
        scale.div_(divisor(scale, CODE_MAX)).clamp_min_(SMALLEST_SCALE)
        yield torch.div(block, scale, out=buffer[: len(block)]), out


def _finished(scales: Tensor, weight: Tensor) -> Tensor:
    if not torch.isfinite(scales).all():
        bad = count_non_finite(weight)
        raise ModelError(f"{bad} of {weight.numel()} weights are not finite (NaN, infinite, or beyond float32)")
    return scales.clamp_max_(LARGEST_SCALE).view(-1)


def count_non_finite(weight: Tensor) -> int:
    """How many values of ``weight`` are NaN, infinite, or overflow float32."""
    weight, count = weight.detach(), 0
    # one cheap sum first: it is finite unless a value is not, or the sum itself overflows
    if weight.dtype == torch.float32 and math.isfinite(weight.sum().item()):
        return 0
    for (block,) in row_blocks(weight):
        block = block.to(torch.float32)
        if not math.isfinite(block.sum().item()):
            count += int((~torch.isfinite(block)).sum())
    return count


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32, groups: int = 0) -> Tensor:
    """Floating weights from codes: ``codes * scales[:, None]``.

    Args:
        codes: ``[out, in, ...]`` int8.
        scales: ``[out]`` float32.
        dtype: of the result. The product is rounded once, in float32 (float64 for a float64 result).
        groups: of a transposed convolution, whose codes are ``[in, out / groups, ...]``; 0 for all others, or
            -1 if there is a scale for each row of the last dimension, or of several last ones.

    Returns:
        Like ``codes``, of ``dtype``.
    """
    work = torch.float64 if dtype == torch.float64 else torch.float32
    factors = spread_scales(codes, scales, groups)
    if codes.is_cuda:  # which multiplies by what it converts on the way
        return torch.mul(codes, factors.to(work)).to(dtype)
    if torch.compiler.is_compiling() or in_transform():
        return torch.mul(codes.to(work), factors).to(dtype)
    # In place: to get new memory for a large weight takes several times as long as to multiply it.
    return codes.to(work, copy=True).mul_(factors).to(dtype)


def spread_scales(codes: Tensor, scales: Tensor, groups: int = 0) -> Tensor:
    """Scales ``[out]`` in a shape that multiplies codes; arguments as for :func:`dequantize`."""
    ones = [1] * (codes.dim() - 1)
    if not groups:
        return scales.view(-1, *ones)
    if groups < 0:
        dims = 1
        while dims < codes.dim() and codes.shape[:dims].numel() != scales.numel():
            dims += 1
        return scales.view(*codes.shape[:dims], *ones[dims - 1 :])
    inputs = codes.shape[0] // groups
    spread = scales.view(groups, 1, -1).expand(groups, inputs, -1)
    return spread.reshape(codes.shape[0], -1, *ones[1:])


def weight_sqnr_db(weight: Tensor, codes: Tensor, scales: Tensor) -> float:
    """Signal to quantization noise ratio of a quantized weight, in decibels.

    ``10·log10(Σ w² / Σ (w − code·scale)²)`` over the whole matrix. Rounding of the float32 quotient
    ``w / scale`` bounds it at about 140 dB.

    Args:
        weight: ``[out, in]``, the float weight.
        codes: ``[out, in]`` int8.
        scales: ``[out]`` float32.

    Returns:
        The ratio in dB; ``inf`` where all weights are whole multiples of their scales (zeros among them).
    """
    weight, scales = weight.detach(), scales.detach()[:, None]
    sqnr, buffer = _Sqnr(weight), _buffer(weight)
    for block, code, scale in row_blocks(weight, codes, scales):
        quotients = torch.div(block.to(torch.float32), scale, out=buffer[: len(block)])
        sqnr.add(quotients, code.to(torch.float32))
    return sqnr.db(scales)


def joint_sqnr_db(weights: Sequence[Tensor], sqnr_db: Sequence[float]) -> float:
    """The SQNR in dB of several weights together, by that of each."""
    if len(weights) == 1:
        return sqnr_db[0]
    signals = [float(weight.detach().double().square().sum()) for weight in weights]
    noise = sum(signal / 10 ** (db / 10) for signal, db in zip(signals, sqnr_db, strict=True))
    return 10 * math.log10(sum(signals) / noise) if noise else math.inf


class _Sqnr:
    """Signal and noise of a weight, block by block of its rows, from the first to the last.

    Both are measured in steps of each row's scale, where no square can overflow or vanish in float32.
    """

    def __init__(self, weight: Tensor) -> None:
        self._norms = torch.zeros(2, len(weight), dtype=torch.float32, device=weight.device)
        self._places = iter(torch.split(self._norms, _block_rows(weight), 1))

    def add(self, quotients: Tensor, codes: Tensor) -> None:
        """Count the next block in; the quotients are overwritten."""
        signal, noise = next(self._places).unbind()
        torch.linalg.vector_norm(quotients, dim=1, out=signal)
        torch.linalg.vector_norm(quotients.sub_(codes), dim=1, out=noise)

    def db(self, scales: Tensor) -> float:
        """The ratio of all rows, whose scales are ``[out, 1]``."""
        signal, noise = self._norms.double().mul_(scales.view(-1)).square_().sum(1).tolist()
        return 10 * math.log10(signal / noise) if signal and noise else math.inf


def predicted_sqnr_db(weight: Tensor) -> float:
    """What :func:`weight_sqnr_db` should come to, from the shape of the distribution alone.

    Uniform rounding noise has variance ``scale²/12`` (Widrow and Kollár, "Quantization Noise", 2008),
    so for one row the ratio is ``52.87 − 20·log10(max|w| / rms)`` dB. Signal and noise are summed over
    rows before they are divided.

    Args:
        weight: ``[out, in]``, any floating dtype.

    Returns:
        The predicted ratio in dB; ``inf`` for a weight of zeros.
    """
    signal = noise = 0.0
    for (block,) in row_blocks(weight.detach()):
        block = block.double()
        signal += block.square().sum().item()
        noise += ((block.abs().amax(1) / CODE_MAX).square() / 12 * block.shape[1]).sum().item()
    return 10 * math.log10(signal / noise) if noise else math.inf


def divisor(x: Tensor, number: int | Tensor) -> int | Tensor:
    """The number as ``x`` is to be divided by it, so that the quotient is rounded once on every device.

    On a GPU torch multiplies by the reciprocal of a Python number or of a number on the CPU, which may round otherwise.
    """
    if x.is_cpu:
        return number
    return number.to(x.device) if isinstance(number, Tensor) else x.new_full((), number)


def activation_steps(x: Tensor, steps: int | Tensor) -> Tensor:
    """The size of one step in each row of fixed point: ``max|row| / steps``.

    Args:
        x: ``[..., in]`` float32 or float64, with at least one feature.
        steps: largest whole number; in a tensor without dimensions, of the same dtype, torch is sooner done with it.

    Returns:
        ``[..., 1]`` like ``x``, positive; not finite where the row is not.
    """
    largest = x.abs().amax(-1, True)
    # SMALLEST_SCALE as a literal: torch.compile(dynamic=True) makes inputs of global floats, and fails where a second
    # layer with gradients meets the same one
    return largest.div_(divisor(largest, steps)).clamp_min_(2.0**-126)


def quantize_rows_to_steps(x: Tensor, steps: int | Tensor) -> tuple[Tensor, Tensor]:
    """Fixed point, row by row: ``x ≈ whole * scale`` with whole numbers in ``-steps…steps``.

    This is dynamic per-token quantization of activations; 127 steps are int8, 32,512 are 16 bits,
    8,323,072 are 24 bits, the precision of float32.

    Args:
        x: ``[..., in]`` float32 or float64, with at least one feature.
        steps: largest whole number; as for :func:`activation_steps`.

    Returns:
        whole: like ``x``, whole numbers held in its floating dtype; NaN where the row is not finite.
        scale: ``[..., 1]`` like ``x``, the size of one step.
    """
    scale = activation_steps(x, steps)
    return torch.div(x, scale).round_(), scale
