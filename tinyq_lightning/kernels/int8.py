"""Linear layers by int8 products: the activations as fixed point, in int8 digits.

Each row is ``x = step · n`` with whole numbers ``n``, written in balanced base 256: digits of
-128…127. Then ``x @ qᵀ`` is one int8 product for each digit, summed exactly, and the parts are put together
by powers of 256. The digits of all rows are stacked, so that the weights are read once. No sum is ever
rounded on the way, so a row's result does not depend on its batch, nor on the number of threads.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from tinyq_lightning.kernels.base import STEPS, CodeHolder, Seen, plus_bias
from tinyq_lightning.kernels.probe import Packed, fbgemm, has_operator, has_vnni, holds, is_hidden
from tinyq_lightning.kernels.weights import activation_steps
from tinyq_lightning.methods import Method

__all__ = [
    "digit_product",
    "fixed_point_product",
    "has_digit_product",
    "has_int8_product",
    "int8_product",
    "one_digit_product",
    "pack_digit",
    "pack_int8",
    "unpack_digit",
    "unpack_int8",
]


@functools.cache
def has_int8_product() -> bool:
    """Whether int8 products are fast here and exact.

    Fast: the processor has the VNNI instructions. Exact: without them torch's operator may add pairs of
    products in 16 bits, which saturate; the largest digits and weights there are tell.
    """
    names = ("qlinear_prepack", "qlinear_pointwise")
    return not is_hidden("int8") and has_vnni() and has_operator("onednn", *names) and holds(_int8_product_is_exact)


@functools.cache
def has_digit_product() -> bool:
    """Whether int8 products of one digit can take it as floats: the conversion is part of the product then.

    Fast and exact as for :func:`has_int8_product`. The operator belongs to a family that torch means to drop.
    """
    names = ("linear_prepack", "linear_unpack", "linear_with_input_q_dq_qweight_dq_output_fp32")
    if is_hidden("int8", "quantized") or not has_vnni():
        return False
    return has_operator("quantized", *names) and holds(_digit_product_is_exact)


def pack_int8(codes: Tensor) -> Packed:
    """Lay out codes ``[out, in]`` int8 for :func:`int8_product`: one byte a weight."""
    return torch.ops.onednn.qlinear_prepack(codes, None)


def unpack_int8(packed: Packed) -> Tensor:
    """The codes ``[out, in]`` int8 again."""
    return packed.to_dense().t().contiguous()  # type: ignore[attr-defined, no-any-return]


def int8_product(digits: Tensor, packed: Packed, scales: Tensor, zero_points: Tensor) -> Tensor:
    """``((digits − 128) @ qᵀ) * s``, the sums exact in int32.

    Args:
        digits: ``[rows, in]`` uint8.
        packed: from :func:`pack_int8`.
        scales: ``[out]`` float32.
        zero_points: ``[out]`` int32, zeros.

    Returns:
        ``[rows, out]`` float32, each rounded from its whole number once and by its scale once.
    """
    return _int8_operator()(digits, 1.0, 128, packed, scales, zero_points, None, 1.0, 0, torch.float32, "none", [], "")


def pack_digit(codes: Tensor, scales: Tensor) -> Packed:
    """Lay out codes ``[out, in]`` int8 and scales ``[out]`` float32 for :func:`digit_product`: one byte a weight."""
    zero_points = codes.new_zeros(len(codes), dtype=torch.int64)
    with warnings.catch_warnings(), fbgemm():
        warnings.simplefilter("ignore")  # that torch means to drop quantized tensors
        weight = torch._make_per_channel_quantized_tensor(codes, scales.double(), zero_points, 0)
        return torch.ops.quantized.linear_prepack(weight, None)


def unpack_digit(packed: Packed) -> Tensor:
    """The codes ``[out, in]`` int8 again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight: Tensor = torch.ops.quantized.linear_unpack(packed)[0]
    return weight.int_repr()


def digit_product(whole: Tensor, packed: Packed) -> Tensor:
    """``(whole @ qᵀ) * s``, the sums exact in int32.

    Args:
        whole: ``[rows, in]`` float32, whole numbers of -128…127.
        packed: from :func:`pack_digit`.

    Returns:
        ``[rows, out]`` float32, each rounded from its whole number once and by its scale once.
    """
    return _digit_operator()(whole, 1.0, 128, packed)


# Looked up once: that alone costs a microsecond.
@functools.cache
def _int8_operator() -> Callable[..., Tensor]:
    return torch.ops.onednn.qlinear_pointwise.default


@functools.cache
def _digit_operator() -> Callable[..., Tensor]:
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default


# Whatever the user's default device and dtype, these are float32 on the CPU.
def _int8_product_is_exact() -> bool:
    codes = torch.full((32, 256), 127, dtype=torch.int8, device="cpu")
    digits = codes.new_full((2, 256), 255, dtype=torch.uint8)
    scales, zero_points = codes.new_ones(32, dtype=torch.float32), codes.new_zeros(32, dtype=torch.int32)
    return bool((int8_product(digits, pack_int8(codes), scales, zero_points) == 256 * 127 * 127).all())


def _digit_product_is_exact() -> bool:
    codes = torch.full((32, 256), 127, dtype=torch.int8, device="cpu")
    packed = pack_digit(codes, codes.new_ones(32, dtype=torch.float32))
    largest = codes.new_full((2, 256), 127, dtype=torch.float32)
    return bool((digit_product(largest, packed) == 256 * 127 * 127).all()) and torch.equal(unpack_digit(packed), codes)


_BITS = torch.tensor(8, dtype=torch.int32, device="cpu")


# Half of each digit's range, in every digit: added to a number, it makes its bytes the digits plus 128.
_OFFSET = torch.tensor(0x808080, dtype=torch.int32, device="cpu")


# Added to a float32, it leaves nothing after the point, rounded to even as by `round`, and the number in the low bits.
_ROUNDING = {
    count: torch.tensor(1.5 * 2**23 + offset, dtype=torch.float32, device="cpu")
    for count, offset in ((1, 0x80), (2, 0x8080))
}


# Up to so many numbers operators cost more than bytes do.
_FEW_NUMBERS = 4096


def fixed_point_product(method: Method, x: Tensor, packed: Packed, scales: Tensor, zero_points: Tensor) -> Tensor:
    """``x @ (q * s)ᵀ`` with the activations held in ``method.digits`` int8 digits.

    Args:
        method: how finely activations are held.
        x: ``[rows, in]`` float32, contiguous.
        packed: the codes, from :func:`~tinyq_lightning.kernels.int8.pack_int8`.
        scales: ``[out]`` float32.
        zero_points: ``[out]`` int32, zeros.

    Returns:
        ``[rows, out]`` float32. A row with NaN or infinity gives no finite value.
    """
    step = activation_steps(x, STEPS[method.digits])
    parts = int8_product(_digits(x / step, method.digits), packed, scales, zero_points)
    if method.digits == 1:
        return parts.mul_(step)
    low, *higher = parts.chunk(method.digits)
    for place, part in enumerate(higher, 1):
        low.add_(part, alpha=256**place)
    return low.mul(step)  # in memory of its own: saved or kept, it is not to take the other parts with it


def one_digit_product(x: Tensor, packed: Packed) -> Tensor:
    """``x @ (q * s)ᵀ`` with the activations held in one int8 digit, by fewer operators than above.

    Args:
        x: ``[rows, in]`` float32, contiguous.
        packed: the codes and scales, from :func:`~tinyq_lightning.kernels.int8.pack_digit`.

    Returns:
        ``[rows, out]`` float32, with the same bits as above.
    """
    step = activation_steps(x, STEPS[1])
    return digit_product(torch.div(x, step).round_(), packed).mul_(step)


def _digits(numbers: Tensor, count: int) -> Tensor:
    """The digits of rounded ``numbers``, each plus 128: ``[rows, in]`` float32 → ``[count * rows, in]`` uint8.

    The lowest digits of all rows come first. ``numbers`` is overwritten.
    """
    by_adding = count < 3  # three digits are too large a number for it
    whole = numbers.add_(_ROUNDING[count]).view(torch.int32) if by_adding else numbers.round_().int().add_(_OFFSET)
    if count == 1:
        return whole.byte()
    rows, columns = whole.shape
    if rows == 1:
        return whole.view(torch.uint8).as_strided((count, columns), (1, 4)).contiguous()
    if rows * columns <= _FEW_NUMBERS:
        bytes_ = whole.view(torch.uint8).as_strided((count, rows, columns), (1, 4 * columns, 4))
        return bytes_.contiguous().view(-1, columns)
    digits = whole.new_empty(count * rows, columns, dtype=torch.uint8)
    for place, digit in enumerate(digits.chunk(count), 1):
        digit.copy_(whole)
        if place < count:
            whole.bitwise_right_shift_(_BITS)
    return digits


class OneDigitWeights(CodeHolder):
    """The codes in one byte each and their scales, for exact products of whole numbers of one int8 digit."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__(codes, scales)
        self._packed = pack_digit(codes, scales)
        self._scales = Seen(scales)

    @override
    def is_of(self, codes: Tensor | None, scales: Tensor) -> bool:
        return self._scales.is_still(scales) and super().is_of(codes, scales)

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        return plus_bias(one_digit_product(x, self._packed), bias)

    @override
    def _unpacked(self) -> Tensor:
        return unpack_digit(self._packed)


class Int8Weights(CodeHolder):
    """The codes in one byte each, for exact products of whole numbers."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__(codes, scales)
        self._packed = pack_int8(codes)
        self._zero_points = codes.new_zeros(len(codes), dtype=torch.int32)

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        return plus_bias(fixed_point_product(method, x, self._packed, scales, self._zero_points), bias)

    @override
    def _unpacked(self) -> Tensor:
        return unpack_int8(self._packed)
