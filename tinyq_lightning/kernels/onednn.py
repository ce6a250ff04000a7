"""Codes packed by oneDNN: exact products of uint8 digits with int8 codes, fast for few rows of large layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor
from typing_extensions import override

from tinyq_lightning.kernels.base import CodeHolder
from tinyq_lightning.kernels.fixed_point import digits_product
from tinyq_lightning.kernels.probe import Packed, can, has_operator, has_vnni, holds, is_hidden
from tinyq_lightning.kernels.tracing import is_exporting_for_this_processor
from tinyq_lightning.methods import Method

__all__ = [
    "OnednnWeights",
    "compiles_packed_product",
    "has_onednn_product",
    "holds_packed_constants",
    "onednn_sums",
    "pack_onednn",
    "packing_in_graphs",
    "unpack_onednn",
]


@functools.cache
def has_onednn_product() -> bool:
    """Return True if oneDNN's packed int8 product is fast and exact on this machine.

    Fast: the processor has the VNNI instructions. Exact: without them torch's operator may add pairs of products in 16
    bits, which saturate; the probe multiplies the largest digits and weights to find out.
    """
    names = ("qlinear_prepack", "qlinear_pointwise")
    return not is_hidden("int8") and has_vnni() and has_operator("onednn", *names) and holds(_is_exact)


def pack_onednn(codes: Tensor) -> Packed:
    """Lay out codes ``[out, in]`` int8 for :func:`onednn_sums`: one byte a weight."""
    return torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)  # it takes no account of strides


def unpack_onednn(packed: Packed) -> Tensor:
    """Return the codes ``[out, in]`` int8 of packed weights."""
    return packed.to_dense().t().contiguous()  # type: ignore[attr-defined, no-any-return]


def onednn_sums(digits: Tensor, packed: Packed, scales: Tensor, zero_points: Tensor) -> Tensor:
    """``(digits − 128) @ (q * s)ᵀ``, the sums exact in int32.

    Args:
        digits: ``[rows, in]`` uint8.
        packed: from :func:`pack_onednn`.
        scales: ``s``, ``[out]`` float32.
        zero_points: ``[out]`` int32, zeros.

    Returns:
        ``[rows, out]`` float32, rounded once from its integer sum and once by its scale.
    """
    return _operator()(digits, 1.0, 128, packed, scales, zero_points, None, 1.0, 0, torch.float32, "none", [], "")


# Cached, because the lookup costs a microsecond.
@functools.cache
def _operator() -> Callable[..., Tensor]:
    return torch.ops.onednn.qlinear_pointwise.default


@functools.cache
def compiles_packed_product() -> bool:
    """Return True if torch's compiler writes machine code of its own for the packed product on this processor.

    It does so for AVX512-VNNI, if the weights are known while it compiles. Calling oneDNN instead costs as much as the
    product of a few rows.
    """
    if not (has_onednn_product() and can("avx512_vnni")):
        return False
    from torch._inductor import constant_folding, lowering  # noqa: F401 - what follows cannot be imported before it
    from torch._inductor.codegen import cpp_micro_gemm

    return hasattr(cpp_micro_gemm, "CppMicroGemmAVX512VNNI") and hasattr(constant_folding, "add_dont_constant_fold")


def holds_packed_constants() -> bool:
    """Return True while a graph is traced for a package that :func:`compiles_packed_product`."""
    return is_exporting_for_this_processor() and compiles_packed_product()


@contextmanager
def packing_in_graphs() -> Iterator[None]:
    """Return a context manager in which graphs can hold :func:`pack_onednn`, whose result torch cannot trace else."""
    with torch.library._scoped_library("onednn", "IMPL") as library:
        with suppress(RuntimeError):  # a torch that traces it itself
            torch.library.register_fake("onednn::qlinear_prepack", lambda codes, shape: codes.t(), lib=library)
        yield


class OnednnWeights(CodeHolder):
    """The codes in one byte each, for exact products of integers."""

    bytes_a_weight = 1

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__(codes, scales)
        self._packed = pack_onednn(codes)
        self._ones = codes.new_ones(len(codes), dtype=torch.float32)
        self._zero_points = codes.new_zeros(len(codes), dtype=torch.int32)

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        scaled = method.digits == 1
        factors = scales.contiguous() if scaled else self._ones

        def sums(digits: Tensor) -> Tensor:
            return onednn_sums(digits, self._packed, factors, self._zero_points)

        return digits_product(method, x, sums, scales, bias, signed=False, scaled=scaled)

    @override
    def _unpacked(self) -> Tensor:
        return unpack_onednn(self._packed)


# Device and dtype are given because the user's defaults may be others.
def _is_exact() -> bool:
    codes = torch.full((32, 256), 127, dtype=torch.int8, device="cpu")
    digits = codes.new_full((2, 256), 255, dtype=torch.uint8)
    ones, zero_points = codes.new_ones(32, dtype=torch.float32), codes.new_zeros(32, dtype=torch.int32)
    return bool((onednn_sums(digits, pack_onednn(codes), ones, zero_points) == 256 * 127 * 127).all())
