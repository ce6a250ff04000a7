"""Products of one int8 digit on processors that add pairs of products in 16 bits: exact, where full digits saturate.

A digit is the difference of two numbers of 0…128, one of which is zero. Less 128 each, they are int8; such processors
shift them back before they multiply, so that no pair of products with codes exceeds ``2 · 128 · 127`` < 2¹⁵. The two
shifts cancel in the difference of the sums. Finer activations take two such products for each of their digits, which
is slower than floats are.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from typing_extensions import override

from tinyq_lightning.kernels.base import STEPS, plus_bias
from tinyq_lightning.kernels.fixed_point import by_row_blocks, floats_in_place
from tinyq_lightning.kernels.integer import PlainWeights, multiplies_exactly
from tinyq_lightning.kernels.probe import holds, is_hidden
from tinyq_lightning.kernels.weights import quantize_rows_to_steps
from tinyq_lightning.methods import Method

__all__ = [
    "SplitWeights",
    "has_split_product",
]


@functools.cache
def has_split_product() -> bool:
    """Return True if ``torch._int_mm`` is fast on this processor, and exact for digits in two parts."""
    vectors = torch.backends.cpu.get_cpu_capability() != "DEFAULT" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return vectors and not is_hidden("int8-split") and hasattr(torch, "_int_mm") and holds(_is_exact)


class SplitWeights(PlainWeights):
    """The codes as they are in the layer's buffer, for integers of one int8 digit."""

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        def product(rows: Tensor, out: Tensor | None) -> Tensor:
            integers, step = quantize_rows_to_steps(rows, STEPS[method.digits])
            sums = floats_in_place(_difference(integers, self._by_columns))
            return plus_bias(torch.mul(sums, scales, out=out).mul_(step), bias)

        return by_row_blocks(x, scales.shape[0], product)


def _difference(integers: Tensor, by_columns: Tensor) -> Tensor:
    """``integers @ qᵀ``: ``[rows, in]`` float32, integers of -128…127, and ``qᵀ`` ``[in, out]`` int8 → int32."""
    count = len(integers)
    parts = integers.new_empty(2 * count, integers.shape[1], dtype=torch.int8)
    parts[:count] = integers.clamp_min(0).sub_(128)
    parts[count:] = integers.clamp_max(0).add_(128).neg_()
    sums = torch._int_mm(parts, by_columns)
    return sums[:count].sub_(sums[count:])


def _is_exact() -> bool:
    return multiplies_exactly(lambda digits, by_columns: _difference(digits.float(), by_columns))
