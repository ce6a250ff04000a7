"""Kernels on a float copy of the weights."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from typing_extensions import override

from tinyq_lightning.kernels.base import STEPS, BesideCodes, Choice, Kernel, LayerShape, WeightForm, plus_bias
from tinyq_lightning.kernels.float16 import COPY_PAYS_TO, has_float16_product
from tinyq_lightning.kernels.weights import dequantize, quantize_rows_to_steps
from tinyq_lightning.methods import Method

__all__ = [
    "FASTEST_WHERE_SMALL",
    "FLOAT32",
    "Float32Weights",
    "copy_variant",
]


FASTEST_WHERE_SMALL = "a float copy in memory, the fastest for layers this small; the file stays small"
"""Why a small layer takes one."""


class Float32Weights(BesideCodes):
    """A float copy of the weights, for activations as they are.

    Attributes:
        weight: ``q * s``, ``[out, in]`` float32.
    """

    bytes_a_weight = 4

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__(codes, scales)
        self.weight = dequantize(codes, scales)

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, self.weight, None if bias is None else bias.float())


class Float32Codes(BesideCodes):
    """A float copy of the codes, for rounded activations.

    Sums of integers below 2²⁴ are exact, so that w8a8 gives the same bits as by any other kernel.
    """

    bytes_a_weight = 4

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__(codes, scales)
        self._float_codes = codes.float()

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        integers, step = quantize_rows_to_steps(x, STEPS[method.digits])
        return plus_bias(nn.functional.linear(integers, self._float_codes).mul_(scales).mul_(step), bias)


def copy_variant(method: Method) -> str:
    """The variant of the float32 kernel for a method: a copy of the weights, or of the codes if it rounds."""
    return "float32x1" if method.rounds else "float32"


class _Float32(Kernel):
    name = "float32"
    devices = frozenset({"cpu"})
    forms: ClassVar[dict[str, type[WeightForm]]] = {"float32": Float32Weights, "float32x1": Float32Codes}

    @override
    def lacks(self, layer: LayerShape) -> str:
        return ""

    @override
    def variant(self, layer: LayerShape) -> str:
        return copy_variant(layer.method)

    @override
    def fastest(self, layer: LayerShape, lacking: str) -> Choice | None:
        if layer.compact:
            return None
        if not has_float16_product():  # all else would rebuild the float weights on each call
            return Choice(self.variant(layer), f"{lacking}: a float copy in memory; the file stays small")
        # The sizes at which a float copy beats the float16 product were measured.
        if layer.weights <= COPY_PAYS_TO[layer.method.digits]:
            return Choice(self.variant(layer), FASTEST_WHERE_SMALL)
        return None


FLOAT32 = _Float32()
"""A float copy of the weights, multiplied as ``nn.Linear`` does."""
