"""The sizes of convolutions, float or quantized, by what they tell of themselves."""

from __future__ import annotations

import math
from typing import Any

from tinyq_lightning.kernels import ConvShape
from tinyq_lightning.layers.kind import WeightSize
from tinyq_lightning.layers.own_forward import padding_of

__all__ = [
    "conv_shape",
    "weight_size",
]


def weight_size(layer: Any) -> WeightSize:
    """The size of the weight of a convolution, by what the layer tells of itself."""
    if layer.transposed:
        shape = (layer.in_channels, layer.out_channels // layer.groups, *layer.kernel_size)
    else:
        shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    return WeightSize(shape, layer.out_channels, dim=int(layer.transposed))


def conv_shape(layer: Any) -> ConvShape:
    """What the choice among kernels depends on, of a float or a quantized convolution."""
    places = math.prod(layer.kernel_size)
    own = padding_of(layer)
    unmoved = (
        own is None
        and layer.padding_mode == "zeros"
        and layer.padding in ("valid", "same", (0,) * len(layer.kernel_size))
    )
    channels = layer.in_channels // layer.groups
    pointwise = unmoved and places == 1 and layer.groups == 1 and channels > 1 and not layer.transposed
    dims = len(layer.kernel_size)
    padding = (0,) if own is not None or isinstance(layer.padding, str) else layer.padding
    alike = all(len(set(each)) == 1 for each in (layer.kernel_size, layer.stride, padding))
    width, stride = layer.kernel_size[0], layer.stride[0]
    usual = (
        dims < 3 and alike and set(layer.dilation) == {1} and width % 2 == 1 and stride in (1, 2) and stride <= width
    )
    sizes = layer.in_channels, layer.out_channels, channels * places
    return ConvShape(*sizes, pointwise, dims, layer.groups, layer.transposed, usual)
