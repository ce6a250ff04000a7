"""Codes of four bits, two a byte, and the int8 numbers that they and the multipliers of their groups stand for.

A weight is ``scale * multiplier * code``: a code of -8…7 for each weight, a whole multiplier of 1…15 for each group of
:data:`GROUP` weights of a row, and a float32 scale for each row. ``multiplier * code`` lies in -120…105, so that it is
a code of int8, and every kernel for int8 codes multiplies by it with the same exactness. Two levels of scales are known
as progressive group quantization (Lin et al., "QServe: W4A8KV4 Quantization and System Co-design", 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinyq_lightning.kernels.weights import row_blocks

__all__ = [
    "GROUP",
    "LARGEST_MULTIPLIER",
    "LEAST_CODE",
    "MOST_CODE",
    "collapse",
    "expand",
    "four_bit_bytes",
    "group_count",
    "multipliers_of",
    "pack_codes",
    "pack_nibbles",
    "packed_shapes",
    "unpack_codes",
    "unpack_nibbles",
]

GROUP = 32
"""The number of weights, one after the other in a row, that have a multiplier. The last group may have fewer."""

LEAST_CODE, MOST_CODE = -8, 7
"""The range of a code."""

LARGEST_MULTIPLIER = 15
"""A multiplier is at least 1."""


def group_count(columns: int) -> int:
    """The number of groups of a row."""
    return -(-columns // GROUP)


def packed_shapes(rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of packed codes and of packed multipliers of a weight ``[rows, columns]``."""
    return (rows, -(-columns // 2)), (rows, -(-group_count(columns) // 2))


def four_bit_bytes(rows: int, columns: int) -> int:
    """The bytes of packed codes and multipliers of a weight ``[rows, columns]``; its scales are not counted."""
    return sum(height * width for height, width in packed_shapes(rows, columns))


def pack_nibbles(values: Tensor) -> Tensor:
    """Two numbers in a byte: the first in the low four bits, the second in the high ones.

    Args:
        values: ``[rows, n]`` uint8 in 0…15.

    Returns:
        ``[rows, ceil(n / 2)]`` uint8. If ``n`` is odd, the high bits of the last byte are zero.
    """
    if values.shape[1] % 2:
        values = nn.functional.pad(values, (0, 1))
    return values[:, ::2] | (values[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """The inverse of :func:`pack_nibbles`: ``[rows, ceil(count / 2)]`` uint8 → ``[rows, count]`` uint8 in 0…15."""
    return _pairs(packed)[:, :count].contiguous()


def pack_codes(codes: Tensor) -> Tensor:
    """Codes ``[rows, columns]`` int8 in -8…7 as two's complement of four bits → ``[rows, ceil(columns / 2)]`` uint8."""
    return pack_nibbles(codes.view(torch.uint8) & 15)


def unpack_codes(packed: Tensor, columns: int) -> Tensor:
    """The inverse of :func:`pack_codes`: → ``[rows, columns]`` int8 in -8…7."""
    return _signed(packed)[:, :columns].contiguous()


def expand(int4_weights: Tensor, multipliers: Tensor, columns: int) -> Tensor:
    """The int8 codes that kernels multiply by: ``multiplier * code``.

    Args:
        int4_weights: ``[rows, ceil(columns / 2)]`` uint8, as :func:`pack_codes` has them.
        multipliers: ``[rows, ceil(groups / 2)]`` uint8, as :func:`pack_nibbles` has them.
        columns: of the weight.

    Returns:
        ``[rows, columns]`` int8 in -120…105, new memory.
    """
    padding = multipliers.shape[1] * GROUP - int4_weights.shape[1]  # two groups for each byte of multipliers
    packed = nn.functional.pad(int4_weights, (0, padding)) if padding else int4_weights
    return _signed(packed).mul_(_repeated(multipliers))[:, :columns].contiguous()


def collapse(codes: Tensor, multipliers: Tensor) -> Tensor:
    """The inverse of :func:`expand`.

    Args:
        codes: ``[rows, columns]`` int8, each a multiple of its group's multiplier.
        multipliers: ``[rows, ceil(groups / 2)]`` uint8, packed.

    Returns:
        ``[rows, ceil(columns / 2)]`` uint8: packed codes.
    """
    columns = codes.shape[1]
    packed = codes.new_empty(packed_shapes(*codes.shape)[0], dtype=torch.uint8)
    for block, factors, made in row_blocks(codes, multipliers, packed):  # or it would take twice the float weight
        spread = multipliers_of(factors, columns).repeat_interleave(GROUP, 1)[:, :columns]
        # Quotients of integers as small as these are exact in float32, which divides faster.
        made.copy_(pack_codes(block.float().div_(spread).to(torch.int8)))
    return packed


def multipliers_of(packed: Tensor, columns: int) -> Tensor:
    """The multiplier of each group: ``[rows, ceil(groups / 2)]`` uint8, packed → ``[rows, groups]`` uint8."""
    return unpack_nibbles(packed, group_count(columns))


# For each byte that holds two multipliers, the 64 int8 that they are beside the codes, as 16 words to copy.
_BYTES = torch.arange(256, device="cpu")
_BOTH_GROUPS = torch.stack((_BYTES & 15, _BYTES >> 4), 1).to(torch.int8).repeat_interleave(GROUP, 1).view(torch.int32)


def _repeated(multipliers: Tensor) -> Tensor:
    """The multiplier of each weight: ``[rows, n]`` uint8, packed → ``[rows, 64 * n]`` int8.

    A look-up takes a quarter of the time of a product that is broadcast over groups as short as these.
    """
    if type(multipliers) is not Tensor or not multipliers.is_cpu or torch.compiler.is_compiling():
        return unpack_nibbles(multipliers, 2 * multipliers.shape[1]).view(torch.int8).repeat_interleave(GROUP, 1)
    rows, width = multipliers.shape[0], 2 * GROUP * multipliers.shape[1]
    found = _BOTH_GROUPS.index_select(0, multipliers.to(torch.int32).view(-1))
    return found.view(torch.int8).view(rows, width)


def _pairs(packed: Tensor) -> Tensor:
    """``[rows, n]`` uint8 → ``[rows, 2n]`` uint8 in 0…15, new memory: the low bits of each byte, then the high ones."""
    # As words of two bytes, which are little-endian here as in a file, the halves lie side by side after one shift.
    words = packed.to(torch.int16)
    return words.bitwise_or_(words << 4).bitwise_and_(0x0F0F).view(torch.uint8)


def _signed(packed: Tensor) -> Tensor:
    """``[rows, n]`` uint8 → ``[rows, 2n]`` int8 in -8…7, new memory."""
    return _pairs(packed).view(torch.int8).bitwise_xor_(8).sub_(8)
