"""Kernels on a float copy of the weights."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import override

from tinyq_lightning.kernels.base import STEPS, BesideCodes, plus_bias
from tinyq_lightning.kernels.weights import dequantize, quantize_rows_to_steps
from tinyq_lightning.methods import Method

__all__ = [
    "Float32Weights",
]


class Float32Weights(BesideCodes):
    """A float copy of the weights, for activations as they are.

    Attributes:
        weight: ``q * s``, ``[out, in]`` float32.
    """

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__(codes, scales)
        self.weight = dequantize(codes, scales)

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, self.weight, None if bias is None else bias.float())

    @override
    def gradient(self, grad: Tensor, scales: Tensor) -> Tensor:
        return grad @ self.weight


class Float32Codes(BesideCodes):
    """A float copy of the codes, for rounded activations.

    Sums of whole numbers below 2²⁴ are exact, so that w8a8 gives the same bits as by any other kernel.
    """

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__(codes, scales)
        self._whole = codes.float()

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        whole, step = quantize_rows_to_steps(x, STEPS[method.digits])
        return plus_bias(nn.functional.linear(whole, self._whole).mul_(scales).mul_(step), bias)

    @override
    def gradient(self, grad: Tensor, scales: Tensor) -> Tensor:
        return grad.mul(scales) @ self._whole
