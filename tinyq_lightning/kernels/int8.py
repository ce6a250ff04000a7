"""Linear layers by int8 products: the activations as fixed point, in int8 digits.

Each row is ``x = step · n`` with integers ``n``, written in balanced base 256: digits of -128…127. Then
``x @ qᵀ`` is one int8 product for each digit, summed exactly, and the sums are put together by powers of
256. The digits of all rows are stacked, so that the weights are read once. No sum is rounded on the way,
so a row's result depends neither on its batch nor on the number of threads.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from tinyq_lightning.kernels.base import (
    LONGEST_SUM,
    STEPS,
    Choice,
    CodeHolder,
    Kernel,
    LayerShape,
    TensorSnapshot,
    WeightForm,
    plus_bias,
)
from tinyq_lightning.kernels.float32 import copy_variant
from tinyq_lightning.kernels.probe import Packed, fbgemm, has_operator, has_vnni, holds, is_hidden
from tinyq_lightning.kernels.weights import activation_steps
from tinyq_lightning.methods import Method

__all__ = [
    "INT8",
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
    """Return True if int8 products are fast and exact on this machine.

    Fast: the processor has the VNNI instructions. Exact: without them torch's operator may add pairs of
    products in 16 bits, which saturate; the probe multiplies the largest digits and weights to find out.
    """
    names = ("qlinear_prepack", "qlinear_pointwise")
    return not is_hidden("int8") and has_vnni() and has_operator("onednn", *names) and holds(_int8_product_is_exact)


@functools.cache
def has_digit_product() -> bool:
    """Return True if an int8 product of one digit takes floats, so that the conversion is part of the product.

    Fast and exact as for :func:`has_int8_product`. The operator belongs to a family that torch plans to remove.
    """
    names = ("linear_prepack", "linear_unpack", "linear_with_input_q_dq_qweight_dq_output_fp32")
    if is_hidden("int8", "quantized") or not has_vnni():
        return False
    return has_operator("quantized", *names) and holds(_digit_product_is_exact)


def pack_int8(codes: Tensor) -> Packed:
    """Lay out codes ``[out, in]`` int8 for :func:`int8_product`: one byte a weight."""
    return torch.ops.onednn.qlinear_prepack(codes, None)


def unpack_int8(packed: Packed) -> Tensor:
    """Return the codes ``[out, in]`` int8 of packed weights."""
    return packed.to_dense().t().contiguous()  # type: ignore[attr-defined, no-any-return]


def int8_product(digits: Tensor, packed: Packed, scales: Tensor, zero_points: Tensor) -> Tensor:
    """``((digits − 128) @ qᵀ) * s``, the sums exact in int32.

    Args:
        digits: ``[rows, in]`` uint8.
        packed: from :func:`pack_int8`.
        scales: ``[out]`` float32.
        zero_points: ``[out]`` int32, zeros.

    Returns:
        ``[rows, out]`` float32, rounded once from its integer sum and once by its scale.
    """
    return _int8_operator()(digits, 1.0, 128, packed, scales, zero_points, None, 1.0, 0, torch.float32, "none", [], "")


def pack_digit(codes: Tensor, scales: Tensor) -> Packed:
    """Lay out codes ``[out, in]`` int8 and scales ``[out]`` float32 for :func:`digit_product`: one byte a weight."""
    zero_points = codes.new_zeros(len(codes), dtype=torch.int64)
    with warnings.catch_warnings(), fbgemm():
        warnings.simplefilter("ignore")  # torch warns that it will remove quantized tensors
        weight = torch._make_per_channel_quantized_tensor(codes, scales.double(), zero_points, 0)
        return torch.ops.quantized.linear_prepack(weight, None)


def unpack_digit(packed: Packed) -> Tensor:
    """Return the codes ``[out, in]`` int8 of packed weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight: Tensor = torch.ops.quantized.linear_unpack(packed)[0]
    return weight.int_repr()


def digit_product(integers: Tensor, packed: Packed) -> Tensor:
    """``(integers @ qᵀ) * s``, the sums exact in int32.

    Args:
        integers: ``[rows, in]`` float32, integers in -128…127.
        packed: from :func:`pack_digit`.

    Returns:
        ``[rows, out]`` float32, rounded once from its integer sum and once by its scale.
    """
    return _digit_operator()(integers, 1.0, 128, packed)


# Cached, because the lookup costs a microsecond.
@functools.cache
def _int8_operator() -> Callable[..., Tensor]:
    return torch.ops.onednn.qlinear_pointwise.default


@functools.cache
def _digit_operator() -> Callable[..., Tensor]:
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default


# Device and dtype are given because the user's defaults may be others.
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


# 128 in each of three digits: added to an integer, it makes the bytes of the sum the digits plus 128.
_OFFSET = torch.tensor(0x808080, dtype=torch.int32, device="cpu")


# Adding this to a float32 rounds it to an integer (ties to even, as `round`), which is then in the low bits.
_ROUNDING = {
    count: torch.tensor(1.5 * 2**23 + offset, dtype=torch.float32, device="cpu")
    for count, offset in ((1, 0x80), (2, 0x8080))
}


# Below this size, call overhead costs more than memory traffic.
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
    return low.mul(step)  # new memory, so that the output does not keep the sums of all digits alive


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
    by_adding = count < 3  # integers of three digits are too large for rounding by addition
    integers = numbers.add_(_ROUNDING[count]).view(torch.int32) if by_adding else numbers.round_().int().add_(_OFFSET)
    if count == 1:
        return integers.byte()
    rows, columns = integers.shape
    if rows == 1:
        return integers.view(torch.uint8).as_strided((count, columns), (1, 4)).contiguous()
    if rows * columns <= _FEW_NUMBERS:
        bytes_ = integers.view(torch.uint8).as_strided((count, rows, columns), (1, 4 * columns, 4))
        return bytes_.contiguous().view(-1, columns)
    digits = integers.new_empty(count * rows, columns, dtype=torch.uint8)
    for place, digit in enumerate(digits.chunk(count), 1):
        digit.copy_(integers)
        if place < count:
            integers.bitwise_right_shift_(_BITS)
    return digits


class OneDigitWeights(CodeHolder):
    """The codes in one byte each and their scales, for exact products of integers of one int8 digit."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__(codes, scales)
        self._packed = pack_digit(codes, scales)
        self._scales = TensorSnapshot(scales)

    @override
    def is_current(self, codes: Tensor | None, scales: Tensor) -> bool:
        return self._scales.matches(scales) and super().is_current(codes, scales)

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        return plus_bias(one_digit_product(x, self._packed), bias)

    @override
    def _unpacked(self) -> Tensor:
        return unpack_digit(self._packed)


class Int8Weights(CodeHolder):
    """The codes in one byte each, for exact products of integers."""

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


# Break-even: from this many multiply-adds (rows × weights) on, int8 is faster than a float32 copy. Measured on AMD
# Zen 5 with AVX512-VNNI, one thread, single layers of 64x64 to 1536x384, 1 to 1024 rows. Their weights stay in the
# cache; int8 pays sooner in a network that does not fit there, so if in doubt the number is the smaller one.
_PAYS_FROM = {"w8a32": 10_000_000, "w8a16": 3_000_000, "w8a8": 600_000}


# Layers of at least this many weights take int8 for any number of rows, because it reads a quarter of the bytes.
_ALWAYS_FROM = 1_000_000


class _Int8(Kernel):
    name = "int8"
    devices = frozenset({"cpu"})
    forms: ClassVar[dict[str, type[WeightForm]]] = {"int8": Int8Weights, "int8x1": OneDigitWeights}
    instead = "exact"

    @override
    def lacks(self, layer: LayerShape) -> str:
        if not has_int8_product():
            return "no fast and exact int8 product here"
        if layer.in_features > LONGEST_SUM:
            return f"sums over {layer.in_features:,} features can overflow int32"
        return ""

    @override
    def variant(self, layer: LayerShape) -> str:
        return "int8x1" if layer.method.digits == 1 and has_digit_product() else "int8"

    @override
    def fastest(self, layer: LayerShape, lacking: str) -> Choice | None:
        variant, reason = self.variant(layer), "the processor has int8 products"
        if layer.weights >= _ALWAYS_FROM:
            return Choice(variant, reason)
        rows = math.ceil(_PAYS_FROM[layer.method.name] / layer.weights)
        return Choice(variant, reason, rows, copy_variant(layer.method))


INT8 = _Int8()
"""Exact products of int8 digits and int8 codes, by oneDNN or FBGEMM."""
