"""Codes packed by FBGEMM: exact products of one int8 digit, with the conversion of floats as part of the product."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from tinyq_lightning.kernels.base import STEPS, CodeHolder, TensorSnapshot, plus_bias
from tinyq_lightning.kernels.fixed_point import by_row_blocks
from tinyq_lightning.kernels.probe import Packed, fbgemm, has_operator, has_vnni, holds, is_hidden
from tinyq_lightning.kernels.weights import quantize_rows_to_steps
from tinyq_lightning.methods import Method

__all__ = [
    "FbgemmWeights",
    "fbgemm_product",
    "has_fbgemm_product",
    "pack_fbgemm",
    "unpack_fbgemm",
]


@functools.cache
def has_fbgemm_product() -> bool:
    """Return True if FBGEMM's int8 product of float digits is fast and exact on this machine.

    Fast and exact as for oneDNN's. The operator belongs to a family that torch plans to remove.
    """
    names = ("linear_prepack", "linear_unpack", "linear_with_input_q_dq_qweight_dq_output_fp32")
    if is_hidden("int8", "quantized") or not has_vnni():
        return False
    return has_operator("quantized", *names) and holds(_is_exact)


def pack_fbgemm(codes: Tensor, scales: Tensor) -> Packed:
    """Lay out codes ``[out, in]`` int8 and scales ``[out]`` float32 for :func:`fbgemm_product`: one byte a weight."""
    zero_points = codes.new_zeros(len(codes), dtype=torch.int64)
    with warnings.catch_warnings(), fbgemm():
        warnings.simplefilter("ignore")  # torch warns that it will remove quantized tensors
        weight = torch._make_per_channel_quantized_tensor(codes, scales.double(), zero_points, 0)
        return torch.ops.quantized.linear_prepack(weight, None)


def unpack_fbgemm(packed: Packed) -> Tensor:
    """Return the codes ``[out, in]`` int8 of packed weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight: Tensor = torch.ops.quantized.linear_unpack(packed)[0]
    return weight.int_repr()


def fbgemm_product(integers: Tensor, packed: Packed) -> Tensor:
    """``(integers @ qᵀ) * s``, the sums exact in int32.

    Args:
        integers: ``[rows, in]`` float32, integers in -128…127.
        packed: from :func:`pack_fbgemm`.

    Returns:
        ``[rows, out]`` float32, rounded once from its integer sum and once by its scale.
    """
    return _operator()(integers, 1.0, 128, packed)


# Cached, because the lookup costs a microsecond.
@functools.cache
def _operator() -> Callable[..., Tensor]:
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default


class FbgemmWeights(CodeHolder):
    """The codes in one byte each and their scales, for exact products of integers of one int8 digit."""

    bytes_a_weight = 1

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__(codes, scales)
        self._packed = pack_fbgemm(codes, scales)
        self._scales = TensorSnapshot(scales)

    @override
    def is_current(self, codes: Tensor | None, scales: Tensor) -> bool:
        return self._scales.matches(scales) and super().is_current(codes, scales)

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        def product(rows: Tensor, out: Tensor | None) -> Tensor:
            integers, step = quantize_rows_to_steps(rows, STEPS[1])
            return plus_bias(torch.mul(fbgemm_product(integers, self._packed), step, out=out), bias)

        return by_row_blocks(x, scales.shape[0], product)

    @override
    def _unpacked(self) -> Tensor:
        return unpack_fbgemm(self._packed)


# Device and dtype are given because the user's defaults may be others.
def _is_exact() -> bool:
    codes = torch.full((32, 256), 127, dtype=torch.int8, device="cpu")
    packed = pack_fbgemm(codes, codes.new_ones(32, dtype=torch.float32))
    largest = codes.new_full((2, 256), 127, dtype=torch.float32)
    return bool((fbgemm_product(largest, packed) == 256 * 127 * 127).all()) and torch.equal(
        unpack_fbgemm(packed), codes
    )
