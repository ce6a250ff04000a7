"""Kernels on codes held as float16: FBGEMM's product of float32 activations with float16 weights."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from typing_extensions import override

from tinyq_lightning.kernels.base import STEPS, SUM_MAX, BesideCodes, CodeHolder, plus_bias
from tinyq_lightning.kernels.formula import input_gradient
from tinyq_lightning.kernels.probe import Packed, fbgemm, has_operator, holds, is_hidden
from tinyq_lightning.kernels.weights import CODE_MAX, activation_steps, quantize_rows_to_steps
from tinyq_lightning.methods import Method

__all__ = [
    "float16_product",
    "has_float16_product",
    "pack_float16",
    "unpack_float16",
]


@functools.cache
def has_float16_product() -> bool:
    """Whether float32 activations can be multiplied with float16 weights, several times faster than rebuilding them."""
    names = ("linear_prepack_fp16", "linear_dynamic_fp16", "linear_unpack_fp16")
    hidden = is_hidden("float16", "quantized")
    return not hidden and has_operator("quantized", *names) and holds(_float16_product_is_right)


def pack_float16(codes: Tensor) -> Packed:
    """Lay out codes ``[out, in]`` int8 for :func:`float16_product`: two bytes a weight, exact."""
    with fbgemm():
        return torch.ops.quantized.linear_prepack_fp16(codes.float(), None)


def unpack_float16(packed: Packed) -> Tensor:
    """The codes ``[out, in]`` int8 again."""
    weight: Tensor = torch.ops.quantized.linear_unpack_fp16(packed)[0]
    return weight.to(torch.int8)


def float16_product(x: Tensor, packed: Packed) -> Tensor:
    """``x @ qᵀ``, summed in float32: ``[..., in]`` float32 → ``[..., out]`` float32."""
    return torch.ops.quantized.linear_dynamic_fp16.default(x, packed)  # type: ignore[no-any-return]


def _float16_product_is_right() -> bool:
    codes = torch.arange(-127, 128, dtype=torch.int8, device="cpu")[:, None].expand(-1, 32).contiguous()
    product = float16_product(codes.new_ones(2, 32, dtype=torch.float32), pack_float16(codes))
    return torch.equal(product, codes.float().sum(1).expand(2, -1))


class Float16Pairs(BesideCodes):
    """The codes in two bytes each, for activations that are to lose nothing.

    The product sums in order, which loses two to four times what ``nn.linear`` does. So a row goes in two parts: whole
    numbers so small that all their sums stay below 2²⁴, which is exact, and the little rest.
    """

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__(codes, scales)
        self._packed = pack_float16(codes)
        steps = min(CODE_MAX, SUM_MAX // (CODE_MAX * codes.shape[1]))
        self._steps = torch.tensor(steps, dtype=torch.float32, device="cpu")

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        rows, columns = x.shape
        parts = x.new_empty(2, rows, columns)
        step = activation_steps(x, self._steps)
        whole = torch.div(x, step, out=parts[0]).round_()
        torch.addcmul(x, whole, step, value=-1, out=parts[1])
        out, rest = float16_product(parts.view(2 * rows, columns), self._packed).view(2, rows, -1).unbind()
        return plus_bias(rest.addcmul_(out, step).mul(scales), bias)  # not a part of something larger

    @override
    def gradient(self, grad: Tensor, scales: Tensor) -> Tensor:
        return input_gradient(grad, self._codes, scales)


class Float16Weights(CodeHolder):
    """The codes in two bytes each, for activations in float32."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__(codes, scales)
        self._packed = pack_float16(codes)

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        if not method.rounds:
            return plus_bias(float16_product(x, self._packed).mul_(scales), bias)
        whole, step = quantize_rows_to_steps(x, STEPS[method.digits])
        return plus_bias(float16_product(whole, self._packed).mul_(scales).mul_(step), bias)

    @override
    def _unpacked(self) -> Tensor:
        return unpack_float16(self._packed)
