"""Products of plain codes by ``torch._int_mm``: operator by operator, and as a formula that compilers can fuse.

In a graph the activations are split into int8 digits as in :mod:`~tinyq_lightning.kernels.fixed_point`, by functional
operators. Nothing is packed, so a graph holds the codes as they are in the layer's buffer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from tinyq_lightning.kernels.base import LONGEST_SUM, SUM_MAX, BesideCodes
from tinyq_lightning.kernels.fixed_point import digits_product
from tinyq_lightning.kernels.onednn import holds_packed_constants, onednn_sums, pack_onednn
from tinyq_lightning.kernels.probe import has_vnni, holds, is_hidden
from tinyq_lightning.kernels.weights import CODE_MAX, quantize_rows_to_steps
from tinyq_lightning.methods import Method

__all__ = [
    "PlainWeights",
    "has_plain_product",
    "integer_product",
    "multiplies_exactly",
    "scaled_sums",
    "takes_integers",
]


@functools.cache
def has_plain_product() -> bool:
    """Return True if ``torch._int_mm`` is fast and exact on this processor."""
    able = not is_hidden("int8") and has_vnni() and hasattr(torch, "_int_mm")
    return able and holds(lambda: multiplies_exactly(torch._int_mm))


def takes_integers(in_features: int) -> bool:
    """Return True if :func:`integer_product` is exact here for so many features, and so is :class:`PlainWeights`."""
    # With one feature torch._int_mm returns wrong numbers (torch 2.13).
    return 2 <= in_features <= LONGEST_SUM and has_plain_product()


class PlainWeights(BesideCodes):
    """The codes as they are in the layer's buffer."""

    bytes_a_weight = 0

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__(codes, scales)
        self._by_columns = codes.t()

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        return digits_product(method, x, self._sums, scales, bias, signed=True)

    def _sums(self, digits: Tensor) -> Tensor:
        return torch._int_mm(digits, self._by_columns)


def integer_product(x: Tensor, int8_weights: Tensor, scales: Tensor, method: Method) -> Tensor:
    """``x @ (q * s)ᵀ`` with the activations held in ``method.digits`` int8 digits, on the CPU.

    Args:
        x: ``[..., in]`` float32.
        int8_weights: ``[out, in]`` int8.
        scales: ``[out]`` float32.
        method: how finely activations are held.

    Returns:
        ``[..., out]`` float32. A row with NaN or infinity gives no finite value.
    """
    integers, step = quantize_rows_to_steps(x.reshape(-1, x.shape[-1]), method.steps)
    out = scaled_sums(integers, int8_weights, scales, method) * step
    return out.view(*x.shape[:-1], int8_weights.shape[0])


def scaled_sums(integers: Tensor, int8_weights: Tensor, scales: Tensor, method: Method) -> Tensor:
    """``integers @ (q * s)ᵀ``: ``[rows, in]`` integers as floats → ``[rows, out]`` likewise, each digit's sums exact.

    A package that is compiled for this processor holds packed codes.
    """
    if _is_packed(method, int8_weights.shape[1]):
        sums = _packed_sums(integers, int8_weights, scales, method.digits)
    else:
        sums = torch._int_mm(_digits(integers, method.digits), int8_weights.t()).to(integers.dtype)
    low, *higher = sums.view(method.digits, integers.shape[0], -1).unbind()  # dynamic shapes: no chunks
    for place, part in enumerate(higher, 1):
        low = low + part * 256.0**place
    return low * scales


def _is_packed(method: Method, in_features: int) -> bool:
    """Whether a package is traced that holds packed codes.

    It multiplies digits plus 128, and takes 128 off when the sums are float32. Sums beyond 2²⁴ lose their last bits by
    that: nothing beside the rounding of activations to one digit, but too much for the upper digits of finer ones.
    """
    return holds_packed_constants() and (method.digits == 1 or 255 * CODE_MAX * in_features < SUM_MAX)


def _packed_sums(integers: Tensor, int8_weights: Tensor, scales: Tensor, count: int) -> Tensor:
    """The sums of all digits, lowest first: ``[rows, in]`` integers as floats → ``[count * rows, out]`` likewise."""
    words = integers.to(torch.int32) + 0x808080 % 256**count  # their bytes are the digits plus 128
    digits = [(words >> 8 * place & 255).to(torch.uint8) for place in range(count)]
    # The compiler must know these while it compiles: it does of what is computed from scales, not of torch.ones.
    ones, zero_points = scales / scales, (scales - scales).view(torch.int32)
    return onednn_sums(torch.cat(digits), pack_onednn(int8_weights), ones, zero_points)


def _digits(integers: Tensor, count: int) -> Tensor:
    """The digits, lowest first: ``[rows, in]`` integers as floats → ``[count * rows, in]`` int8."""
    if count == 1:
        return integers.to(torch.int8)
    rest, digits = integers.to(torch.int32), []
    for _ in range(count - 1):
        low = (rest << 24) >> 24
        digits.append(low.to(torch.int8))
        rest = (rest - low) >> 8
    return torch.cat([*digits, rest.to(torch.int8)])


def multiplies_exactly(product: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether the largest digits do not saturate in a product, and random ones of several sizes give exact sums.

    Args:
        product: ``[rows, in]`` int8 digits and ``[in, out]`` int8 codes → ``[rows, out]`` sums.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    for rows, columns, outputs in ((1, 256, 32), (3, 256, 32), (5, 2, 3), (17, 33, 50)):
        codes = torch.randint(-127, 128, (outputs, columns), generator=generator, dtype=torch.int8, device="cpu")
        digits = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8, device="cpu")
        most = torch.full_like(codes, 127)
        for a, b in ((digits, codes), *((torch.full_like(digits, largest), most) for largest in (-128, 127))):
            if not torch.equal(product(a, b.t()).double(), a.double() @ b.double().t()):
                return False
    return True
