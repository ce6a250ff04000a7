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

from tinyq_lightning.kernels.base import STEPS, BesideCodes, plus_bias
from tinyq_lightning.kernels.fixed_point import by_row_blocks
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


class SplitWeights(BesideCodes):
    """The codes as they are in the layer's buffer, for integers of one int8 digit."""

    bytes_a_weight = 0

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__(codes, scales)
        self._by_columns = codes.t()

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        def product(rows: Tensor, out: Tensor | None) -> Tensor:
            integers, step = quantize_rows_to_steps(rows, STEPS[method.digits])
            sums = _difference(integers, self._by_columns)
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
    generator = torch.Generator("cpu").manual_seed(0)
    for rows, columns, outputs in ((1, 256, 32), (5, 2, 3), (17, 33, 50)):
        codes = torch.randint(-127, 128, (outputs, columns), generator=generator, dtype=torch.int8, device="cpu")
        digits = torch.randint(-128, 128, (rows, columns), generator=generator, device="cpu").float()
        extreme = torch.full_like(digits, -128), torch.full_like(codes, 127)
        for a, b in ((digits, codes), extreme, (-extreme[0] - 1, extreme[1])):
            if not torch.equal(_difference(a, b.t()).double(), a.double() @ b.double().t()):
                return False
    return True
