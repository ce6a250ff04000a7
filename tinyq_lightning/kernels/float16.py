"""Kernels on codes held as float16: FBGEMM's product of float32 activations with float16 weights."""

from __future__ import annotations

import functools
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from tinyq_lightning.kernels.base import (
    STEPS,
    SUM_MAX,
    BesideCodes,
    Choice,
    CodeHolder,
    Kernel,
    LayerShape,
    WeightForm,
    plus_bias,
)
from tinyq_lightning.kernels.probe import Packed, fbgemm, has_operator, holds, is_hidden
from tinyq_lightning.kernels.weights import CODE_MAX, activation_steps, quantize_rows_to_steps
from tinyq_lightning.methods import Method

__all__ = [
    "COPY_PAYS_TO",
    "FLOAT16",
    "float16_product",
    "has_float16_product",
    "pack_float16",
    "unpack_float16",
]


@functools.cache
def has_float16_product() -> bool:
    """Return True if torch multiplies float32 activations by float16 weights: faster than rebuilding float weights."""
    names = ("linear_prepack_fp16", "linear_dynamic_fp16", "linear_unpack_fp16")
    hidden = is_hidden("float16", "quantized")
    return not hidden and has_operator("quantized", *names) and holds(_float16_product_is_right)


def pack_float16(codes: Tensor) -> Packed:
    """Lay out codes ``[out, in]`` int8 for :func:`float16_product`: two bytes a weight, exact."""
    with fbgemm():
        return torch.ops.quantized.linear_prepack_fp16(codes.float(), None)


def unpack_float16(packed: Packed) -> Tensor:
    """Return the codes ``[out, in]`` int8 of packed weights."""
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
    """The codes in two bytes each, for activations that must not lose precision.

    The product sums in order, which loses two to four times as much as ``nn.Linear`` does. So a row is split in two
    parts: integers so small that all their sums stay below 2²⁴, which is exact, and the small remainder.
    """

    bytes_a_weight = 2

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
        integers = torch.div(x, step, out=parts[0]).round_()
        torch.addcmul(x, integers, step, value=-1, out=parts[1])
        out, rest = float16_product(parts.view(2 * rows, columns), self._packed).view(2, rows, -1).unbind()
        return plus_bias(
            rest.addcmul_(out, step).mul(scales), bias
        )  # new memory, so that the output does not keep both parts alive


class Float16Weights(CodeHolder):
    """The codes in two bytes each, for activations in float32."""

    bytes_a_weight = 2

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__(codes, scales)
        self._packed = pack_float16(codes)

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        if not method.rounds:
            return plus_bias(float16_product(x, self._packed).mul_(scales), bias)
        integers, step = quantize_rows_to_steps(x, STEPS[method.digits])
        return plus_bias(float16_product(integers, self._packed).mul_(scales).mul_(step), bias)

    @override
    def _unpacked(self) -> Tensor:
        return unpack_float16(self._packed)


COPY_PAYS_TO = {3: 600_000, 2: 512 * 512, 1: 512 * 512}
"""Layers of at most this many weights are faster with a float32 copy, by the method's digits. Measured on AVX2, as what
follows."""


# `float16x2` is faster than the formula for at most 16 rows. With more features its integers would be too coarse.
_PAIRS_PAY_TO, _PAIRS_FEATURES = 16, SUM_MAX // (127 * 8)


class _Float16(Kernel):
    name = "float16"
    devices = frozenset({"cpu"})
    forms: ClassVar[dict[str, type[WeightForm]]] = {"float16": Float16Weights, "float16x2": Float16Pairs}

    @override
    def lacks(self, layer: LayerShape) -> str:
        return "" if has_float16_product() else "no float16 product here"

    @override
    def variant(self, layer: LayerShape) -> str:
        return "float16x2" if self._takes_pairs(layer) else "float16"

    @override
    def fastest(self, layer: LayerShape, lacking: str) -> Choice | None:
        if layer.compact or layer.weights <= COPY_PAYS_TO[layer.method.digits]:
            return None
        if layer.method.rounds:
            return Choice("float16", lacking or "faster than the int8 products of this processor")
        if self._takes_pairs(layer):
            return Choice("reference", lacking, _PAIRS_PAY_TO + 1, "float16x2")
        return None

    def _takes_pairs(self, layer: LayerShape) -> bool:
        return not layer.method.rounds and layer.in_features <= _PAIRS_FEATURES


FLOAT16 = _Float16()
"""Codes held as float16, multiplied by FBGEMM."""
