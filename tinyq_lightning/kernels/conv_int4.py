"""Convolutions by codes that stay packed in four bits, which are expanded on each call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from tinyq_lightning.kernels.conv_forms import ConvForm
from tinyq_lightning.kernels.convolution import Geometry
from tinyq_lightning.kernels.int4 import NibbleWeights
from tinyq_lightning.methods import Method

__all__ = [
    "ConvNibbles",
]

Convolve = Callable[[Method, Tensor, Tensor, Tensor, "Tensor | None", Geometry], Tensor]
"""Method, input, codes, scales, bias and geometry → output, by codes that are used once."""


class ConvNibbles(ConvForm, NibbleWeights):
    """Packed codes of a convolution, the only copy in memory.

    Args:
        codes: ``multiplier * code``, int8 in the shape of the weight.
        scales: ``[out]`` float32.
        geometry: how the convolution moves over its input.
        first: a tensor of the shape of the first input.
        multipliers: ``[out, ceil(groups / 2)]`` uint8, packed.
        to_rows: brings codes into ``[out, columns]``.
        from_rows: its inverse.
        convolve: how the expanded codes are used.
    """

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        geometry: Geometry,
        first: Tensor,
        multipliers: Tensor,
        to_rows: Callable[[Tensor], Tensor],
        from_rows: Callable[[Tensor], Tensor],
        convolve: Convolve,
    ) -> None:
        NibbleWeights.__init__(self, codes, scales, multipliers, to_rows, from_rows)
        self.geometry, self.kernel_size = geometry, tuple(codes.shape[2:])
        self._convolve = convolve

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        with torch.no_grad():
            return self._convolve(method, x, self._unpacked(), scales, bias, self.geometry)
