"""What the rows of a convolution's weight are multiplied with: its inputs, unfolded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tinyq_lightning.layers.own_forward import padding_of

__all__ = [
    "unfolded",
]

# Samples are unfolded in blocks of about this many values.
_BLOCK_VALUES = 4_194_304


def unfolded(layer: Any, x: Tensor) -> Iterator[Tensor]:
    """The inputs of a convolution as what it multiplies its weight with, some samples at a time.

    The output at a place is the product of a row of the weight, ``in / groups × kernel`` values as
    :meth:`~tinyq_lightning.layers.kind.WeightSize.to_rows` has them, and the values at that place.

    Args:
        layer: float.
        x: ``[samples, in, …]``, or one sample.

    Yields:
        ``[groups, places, in / groups × kernel]`` each.
    """
    dims = len(layer.kernel_size)
    x = x if x.dim() == dims + 2 else x[None]
    spread = _spread_out if layer.transposed else _padded
    values = 1 if not len(x) else max(1, spread(layer, x[:1]).numel() * math.prod(layer.kernel_size))
    for samples in torch.split(x, max(1, _BLOCK_VALUES // values)):
        yield _windows(layer, spread(layer, samples))


def _windows(layer: Any, x: Tensor) -> Tensor:
    dims = len(layer.kernel_size)
    stride = (1,) * dims if layer.transposed else layer.stride
    for dim, (width, step, gap) in enumerate(zip(layer.kernel_size, stride, layer.dilation, strict=True)):
        x = x.unfold(2 + dim, gap * (width - 1) + 1, step)[..., ::gap]
    if layer.transposed:  # the first value of the kernel meets the last of the window
        x = x.flip(tuple(range(-dims, 0)))
    x = torch.unflatten(x, 1, (layer.groups, -1))  # [samples, groups, channels, places…, kernel…]
    places = tuple(range(3, 3 + dims))
    x = x.permute(1, 0, *places, 2, *range(3 + dims, 3 + 2 * dims))
    return x.flatten(1, 1 + dims).flatten(2)


def _padded(layer: Any, x: Tensor) -> Tensor:
    if (own := padding_of(layer)) is not None:
        return nn.functional.pad(x, own.ends_for(layer, x.shape[2:]), own.mode)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return nn.functional.pad(x, list(layer._reversed_padding_repeated_twice), mode)


def _spread_out(layer: Any, x: Tensor) -> Tensor:
    """The input of a transposed convolution as that of an ordinary one: with zeros between its values, and around."""
    sizes = [(size - 1) * step + 1 if size else 0 for size, step in zip(x.shape[2:], layer.stride, strict=True)]
    spread = torch.zeros(*x.shape[:2], *sizes, dtype=x.dtype, device=x.device)
    places: Any = (..., *(slice(None, None, step) for step in layer.stride))
    spread[places] = x
    ends: list[int] = []
    moves = zip(layer.kernel_size, layer.dilation, layer.padding, layer.output_padding, strict=True)
    for width, gap, padding, more in reversed(list(moves)):
        around = gap * (width - 1) - padding
        ends += [around, around + more]
    return nn.functional.pad(spread, ends)
