"""The orders of a convolution's values in memory: the places of a channel side by side, or the channels of a place."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "LAYOUTS",
    "is_channels_last",
    "layout_of",
]

LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The memory format that has channels last, by the number of dimensions; in three there is none."""


def layout_of(x: Tensor) -> torch.memory_format:
    """The order in memory in which torch's convolutions return what they make of ``x`` ``[N, C, ...]``."""
    return LAYOUTS[x.dim()] if is_channels_last(x) else torch.contiguous_format


def is_channels_last(x: Tensor) -> bool:
    """Whether torch takes the channels of ``x`` ``[N, C, ...]`` to be last.

    By its rule of strides, which need not be dense: none is shorter than what lies within, from channels over places to
    samples, also where there is one sample, one place or one channel.
    """
    if x.dim() not in LAYOUTS or not x.numel() or x.stride(1) == 0:
        return False
    within = 0
    for dim in (1, *range(x.dim() - 1, 1, -1)):
        if x.stride(dim) < within:
            return False
        within = x.stride(dim) * x.shape[dim]
    return x.stride(0) >= within and within != x.stride(1)
