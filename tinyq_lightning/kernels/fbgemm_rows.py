"""Rows packed for FBGEMM's look-ups: each row's bytes with its scale beside them, read and expanded in one pass."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from tinyq_lightning.kernels.base import CodeHolder, version_of
from tinyq_lightning.kernels.probe import has_operator, holds, is_hidden
from tinyq_lightning.methods import Method

__all__ = [
    "FbgemmRows",
    "has_fbgemm_rows",
]

# A byte is a code and this; FBGEMM adds ``-128 * scale``, so that the row's values are those of the codes.
_ZERO = 128


# The numbers up to so many are kept from one look-up to the next, because to make them takes a fifth of it.
_KEPT = 1024


# The scale and what is added, float32 both, follow the bytes of a row.
_MORE_BYTES = 8


@functools.cache
def has_fbgemm_rows() -> bool:
    """Return True if FBGEMM looks rows up with the bits of ``code * scale`` on this machine.

    It does where it rounds ``byte * scale - 128 * scale`` once, by a fused multiply-add. The operator belongs to a
    family that torch plans to remove.
    """
    name = "embedding_bag_byte_rowwise_offsets"
    return not is_hidden("quantized") and has_operator("quantized", name) and holds(_is_exact)


class FbgemmRows(CodeHolder):
    """The codes in one byte each, with eight bytes more for each row.

    Attributes:
        is_exact: whether no scale is so large that what FBGEMM adds is not finite; nothing is to be looked up if not.
    """

    bytes_a_weight = 1

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__(codes, scales)
        self._scales, self._scales_version = scales, version_of(scales)
        self._begins = 0, torch.int64, torch.arange(0, device=codes.device)
        columns = codes.shape[1]
        ends = torch.stack([scales, scales * -_ZERO], 1)
        self.is_exact = bool(ends.isfinite().all())
        self._look_up = _operator()
        self._packed = codes.new_empty(len(codes), columns + _MORE_BYTES, dtype=torch.uint8)
        torch.bitwise_xor(codes.view(torch.uint8), _ZERO, out=self._packed[:, :columns])
        self._packed[:, columns:] = ends.view(torch.uint8)

    @override
    def is_current(self, codes: Tensor | None, scales: Tensor) -> bool:
        # Written out instead of using TensorSnapshot: a few rows are looked up in some microseconds.
        if scales is not self._scales or (self._scales_version >= 0 and scales._version != self._scales_version):
            return False
        return codes is None if self._source.plain is None else super().is_current(codes, scales)

    def rows(self, index: Tensor) -> Tensor:
        """``index`` ``[...]`` of integers → ``[..., columns]`` float32.

        Raises:
            RuntimeError: an index is beyond the table.
        """
        count, dtype, begins = self._begins
        if count != index.numel() or dtype is not index.dtype:
            begins = self._begins_of(index)
        if index.dim() == 1:
            return self._look_up(self._packed, index.contiguous(), begins)
        return self._look_up(self._packed, index.reshape(-1), begins).view(*index.shape, self.shape[1])

    def _begins_of(self, index: Tensor) -> Tensor:
        count, dtype = index.numel(), index.dtype
        begins = torch.arange(count, dtype=dtype, device=index.device)
        if count <= _KEPT:
            self._begins = count, dtype, begins  # one value, because threads may look up at the same time
        return begins

    def sums(
        self, index: Tensor, offsets: Tensor, weights: Tensor | None = None, includes_last: bool = False
    ) -> Tensor:
        """Sums of rows.

        Args:
            index: ``[n]`` of integers.
            offsets: ``[bags]`` of the same dtype, where each bag begins; the first is 0.
            weights: ``[n]`` float32, factors of the rows.
            includes_last: whether the end of the last bag is one of the offsets.

        Returns:
            ``[bags, columns]`` float32.

        Raises:
            RuntimeError: an index is beyond the table, or a bag beyond the indices.
        """
        return self._look_up(
            self._packed, index.contiguous(), offsets.contiguous(), False, 0, False, weights, None, includes_last
        )

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError("rows are looked up, not multiplied")

    @override
    def _unpacked(self) -> Tensor:
        return (self._packed[:, : self.shape[1]] ^ _ZERO).view(torch.int8)


@functools.cache  # because the lookup costs a microsecond
def _operator() -> Callable[..., Tensor]:
    # without the method in Python around it, which takes another microsecond
    return torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default._op


def _is_exact() -> bool:
    """Whether random rows of several sizes, and those with the smallest and the largest scales, have the same bits."""
    generator = torch.Generator("cpu").manual_seed(0)
    for columns in (1, 7, 16, 33, 64):
        codes = torch.randint(-128, 128, (64, columns), generator=generator, device="cpu").to(torch.int8)
        scales = torch.rand(64, generator=generator, device="cpu", dtype=torch.float32)
        scales[0], scales[1], scales[2] = 1e-38, 1e-44, 1e36
        rows, index = FbgemmRows(codes, scales), torch.arange(64, device="cpu")
        if not torch.equal(rows.rows(index), codes * scales[:, None]) or not torch.equal(rows.codes(), codes):
            return False
        halves = rows.sums(index, torch.tensor([0, 32], device="cpu"))
        wanted = (codes[3:].double() * scales[3:, None]).sum(0)
        ones = rows.sums(index[3:], torch.tensor([0], device="cpu"))[0]
        if halves.shape != (2, columns) or not torch.allclose(ones.double(), wanted, rtol=1e-4, atol=1e-3):
            return False
    return True
