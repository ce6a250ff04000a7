"""Products with codes that stay packed in four bits, which are expanded to int8 a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from tinyq_lightning.kernels.base import STEPS, Choice, CodeHolder, Kernel, LayerShape, WeightForm, plus_bias
from tinyq_lightning.kernels.fixed_point import digits_product
from tinyq_lightning.kernels.formula import FormulaName, quantized_linear
from tinyq_lightning.kernels.integer import takes_integers
from tinyq_lightning.kernels.nibbles import collapse, expand
from tinyq_lightning.kernels.weights import quantize_rows_to_steps
from tinyq_lightning.methods import Method

__all__ = [
    "INT4",
    "NibbleWeights",
]

# A block of so many codes stays in the cache between its expansion and its product.
_BLOCK_WEIGHTS = 262_144


class NibbleWeights(CodeHolder):
    """Codes of four bits, two a byte, with the multipliers of their groups: the only copy of the codes in memory.

    Args:
        codes: ``multiplier * code``, int8 in the shape of the weight.
        scales: ``[out]`` float32.
        multipliers: ``[out, ceil(groups / 2)]`` uint8, packed.
        to_rows: brings codes into ``[out, in]``; None if the values of a row lie one after the other.
        from_rows: its inverse.

    Attributes:
        int4_weights: ``[out, ceil(in / 2)]`` uint8, packed.
    """

    bytes_a_weight = 0.52

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        multipliers: Tensor,
        to_rows: Callable[[Tensor], Tensor] | None = None,
        from_rows: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(codes, scales)
        rows = codes.reshape(len(scales), -1) if to_rows is None else to_rows(codes)
        self.int4_weights, self._multipliers = collapse(rows, multipliers), multipliers
        self._columns, self._from_rows = rows.shape[1], from_rows

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        if x.is_cuda:
            formula: FormulaName = "reference"
            if method.rounds and takes_integers(self.shape[1], "cuda"):
                formula = "integer"
            return quantized_linear(method, formula, x, self._unpacked(), scales, bias)
        if x.is_cpu and takes_integers(self.shape[1]):
            return digits_product(method, x, self._sums, scales, bias, signed=True)
        integers, step = quantize_rows_to_steps(x, STEPS[method.digits]) if method.rounds else (x, None)
        out = x.new_empty(len(x), self.shape[0])
        for rows, codes in self._blocks():
            torch.mm(integers, codes.to(x.dtype).t(), out=out[:, rows])
        out.mul_(scales)
        return plus_bias(out if step is None else out.mul_(step), bias)

    def rows(self, indices: Tensor) -> Tensor:
        """Some rows of the codes: ``[n]`` of integers → ``[n, in]`` int8."""
        packed, multipliers = (torch.embedding(each, indices) for each in (self.int4_weights, self._multipliers))
        return expand(packed, multipliers, self.shape[1])

    def _sums(self, digits: Tensor) -> Tensor:
        sums = digits.new_empty(len(digits), self.shape[0], dtype=torch.int32)
        for rows, codes in self._blocks():
            sums[:, rows] = torch._int_mm(digits, codes.t())
        return sums

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of rows, each with its codes ``[rows, in]`` int8."""
        outputs, inputs = self.shape
        count = max(1, _BLOCK_WEIGHTS // inputs)
        for start in range(0, outputs, count):
            rows = slice(start, min(start + count, outputs))
            yield rows, expand(self.int4_weights[rows], self._multipliers[rows], inputs)

    @override
    def _unpacked(self) -> Tensor:
        rows = expand(self.int4_weights, self._multipliers, self._columns)
        return rows.view(self.shape) if self._from_rows is None else self._from_rows(rows)


class _Int4(Kernel):
    name = "int4"
    devices = None
    forms: ClassVar[dict[str, type[WeightForm]]] = {"int4": NibbleWeights}

    @override
    def lacks(self, layer: LayerShape) -> str:
        return ""

    @override
    def variant(self, layer: LayerShape) -> str:
        return "int4" if layer.method.bits == 4 else "reference"

    @override
    def fastest(self, layer: LayerShape, lacking: str) -> Choice | None:
        if not layer.compact or layer.method.bits != 4:
            return None
        return Choice("int4", "half a byte a weight, expanded on each call")


INT4 = _Int4()
"""Codes of four bits that stay packed: for layers that are to be small in memory, at the cost of speed."""
