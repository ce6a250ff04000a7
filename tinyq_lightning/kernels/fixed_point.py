"""Activations as fixed point, in int8 digits, so that products with int8 codes are sums of integers.

Each row is ``x = step · n`` with integers ``n``, written in balanced base 256: digits of -128…127. Then ``x @ qᵀ`` is
one int8 product for each digit, summed exactly, and the sums are put together by powers of 256. The digits of all rows
are stacked, so that the weights are read once. No sum is rounded on the way, so a row's result depends neither on its
batch nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tinyq_lightning.kernels.base import STEPS, plus_bias
from tinyq_lightning.kernels.probe import has_amx
from tinyq_lightning.kernels.weights import SMALLEST_SCALE, activation_steps
from tinyq_lightning.methods import Method

__all__ = [
    "by_row_blocks",
    "digits_of",
    "digits_product",
    "floats_in_place",
    "row_steps",
]

# Outputs of one block of rows: what lies between two operators stays in the cache, and memory of this size is had
# again from the allocator, where larger pieces come from the system page by page.
_BLOCK_OUTPUTS = 393_216


# With AMX products are so fast that it counts how often the weights are read for them: once for each block. And outputs
# of one digit are finished where they lie, but would be copied out of a block. So up to the second number of inputs or
# outputs, whichever are more, all rows are one block; beyond, blocks have the first. Measured on an Intel Xeon.
_BLOCK_WITH_AMX, _WHOLE_WITH_AMX = 2_359_296, 4_194_304


# Fewer rows than this in a block cost more by preparing each product than they save.
_FEWEST_ROWS = 64


# Constants are 0-d tensors, so that torch need not convert a Python number on every call.
_EIGHT = torch.tensor(8, dtype=torch.int32, device="cpu")


# 128 in each digit, by their number: added to an integer, it makes the bytes of the sum the digits plus 128.
_OFFSETS = {count: torch.tensor(0x808080 % 256**count, dtype=torch.int32, device="cpu") for count in (1, 2, 3)}


# Adding 1.5 · 2²³ to a float32 rounds it to an integer (ties to even, as `round`), which is then in the low bits.
_ROUNDING = {
    count: torch.tensor(1.5 * 2**23 + _OFFSETS[count].item(), dtype=torch.float32, device="cpu") for count in (1, 2)
}


# How far each digit lies above the lowest byte of an integer.
_SHIFTS = {count: torch.tensor([[[0]], [[8]], [[16]]][:count], dtype=torch.int32, device="cpu") for count in (2, 3)}


# Below this size, call overhead costs more than memory traffic.
_FEW_NUMBERS = 16_384


def by_row_blocks(
    x: Tensor, out_features: int, product: Callable[[Tensor, Tensor | None], Tensor], digits: int = 1
) -> Tensor:
    """A product whose rows do not depend on one another, a block of rows at a time.

    Args:
        x: ``[rows, in]``.
        out_features: columns of the product.
        product: takes some rows of ``x`` and where to put theirs of the result, or None for new memory.
        digits: in how many each input is held.

    Returns:
        ``[rows, out_features]`` like ``x``.
    """
    rows = _rows_at_once(x, out_features, digits)
    if x.shape[0] <= rows:
        return product(x, None)
    out = x.new_empty(x.shape[0], out_features)
    for block, place in zip(torch.split(x, rows), torch.split(out, rows), strict=True):
        product(block, place)
    return out


def _rows_at_once(x: Tensor, out_features: int, digits: int) -> int:
    if digits > 1 or not has_amx():
        return max(_FEWEST_ROWS, _BLOCK_OUTPUTS // max(1, out_features))
    rows, numbers = x.shape[0], max(1, out_features, x.shape[1])
    return rows if rows * numbers <= _WHOLE_WITH_AMX else max(_FEWEST_ROWS, _BLOCK_WITH_AMX // numbers)


def digits_product(
    method: Method,
    x: Tensor,
    sums: Callable[[Tensor], Tensor],
    scales: Tensor,
    bias: Tensor | None,
    signed: bool,
    scaled: bool = False,
) -> Tensor:
    """``x @ (q * s)ᵀ + bias`` with the activations held in ``method.digits`` int8 digits.

    Args:
        method: how finely activations are held.
        x: ``[rows, in]`` float32, contiguous.
        sums: ``digits @ qᵀ``: ``[n, in]`` digits → ``[n, out]`` exact sums, int32, or float32 rounded once.
        scales: ``s``, ``[out]`` float32.
        bias: ``[out]`` floating, or None.
        signed: whether ``sums`` takes digits as int8, or as uint8 with 128 added.
        scaled: whether it gives the sums, of one digit, times ``s``.

    Returns:
        ``[rows, out]`` float32. A row with NaN or infinity gives no finite value.
    """

    def product(rows: Tensor, out: Tensor | None) -> Tensor:
        step = row_steps(rows, STEPS[method.digits])
        parts = sums(_digits(torch.div(rows, step), method.digits, signed))
        if scaled:
            return plus_bias(torch.mul(parts, step, out=parts if out is None else out), bias)
        return plus_bias(_put_together(parts, method.digits, scales, out).mul_(step), bias)

    return by_row_blocks(x, scales.shape[0], product, method.digits)


def row_steps(rows: Tensor, steps: Tensor) -> Tensor:
    """As :func:`activation_steps`, with the same bits; absolute values would have to be written first."""
    if rows.numel() <= _FEW_NUMBERS:
        return activation_steps(rows, steps)
    largest = torch.maximum(rows.amax(-1, True), rows.amin(-1, True).neg_())
    return largest.div_(steps).clamp_min_(SMALLEST_SCALE)


def _put_together(parts: Tensor, count: int, scales: Tensor, out: Tensor | None) -> Tensor:
    """The sums of all digits, lowest first, as numbers times scales: ``[count * rows, out]`` → ``[rows, out]``."""
    sums = floats_in_place(parts)
    if count == 1:
        return sums.mul_(scales) if out is None else torch.mul(sums, scales, out=out)
    low, *higher = sums.chunk(count)
    total = higher.pop()
    if higher:
        total = higher[0].add_(total, alpha=256)
    return torch.add(low, total, alpha=256, out=out).mul_(scales)


def floats_in_place(sums: Tensor) -> Tensor:
    """Sums as float32, int32 ones rounded where they lie: an operator that is given both copies the integers first."""
    return sums if sums.is_floating_point() else sums.view(torch.float32).copy_(sums)


def _digits(numbers: Tensor, count: int, signed: bool) -> Tensor:
    """The digits of rounded ``numbers``: ``[rows, in]`` float32 → ``[count * rows, in]`` int8, or uint8 plus 128.

    The lowest digits of all rows come first. ``numbers`` is overwritten.
    """
    dtype, integers = torch.int8 if signed else torch.uint8, _words(numbers, count, signed)
    if count == 1:
        return integers.to(dtype)
    rows, columns = integers.shape
    if rows * columns <= _FEW_NUMBERS:
        return torch.bitwise_right_shift(integers, _SHIFTS[count]).to(dtype).view(-1, columns)
    digits = integers.new_empty(count * rows, columns, dtype=dtype)
    for place, digit in enumerate(digits.chunk(count), 1):
        digit.copy_(integers)
        if place < count:
            integers.bitwise_right_shift_(_EIGHT)
    return digits


def digits_of(numbers: Tensor, count: int, signed: bool) -> Iterator[Tensor]:
    """The digits of rounded ``numbers``, the lowest first: int8, or each plus 128 uint8. ``numbers`` is overwritten."""
    dtype, integers = torch.int8 if signed else torch.uint8, _words(numbers, count, signed)
    for place in range(count):
        if place:
            integers.bitwise_right_shift_(_EIGHT)
        yield integers.to(dtype)


def _words(numbers: Tensor, count: int, signed: bool) -> Tensor:
    """Rounded ``numbers``, overwritten, as whole numbers whose lowest bytes are the digits, or the digits plus 128."""
    if count == 1 and signed:
        return numbers.round_()
    if count < 3:  # integers of three digits are too large for rounding by addition
        integers = numbers.add_(_ROUNDING[count]).view(torch.int32)
    else:
        integers = numbers.round_().int().add_(_OFFSETS[count])
    return integers.bitwise_xor_(_OFFSETS[count]) if signed else integers  # 128 less, byte by byte
