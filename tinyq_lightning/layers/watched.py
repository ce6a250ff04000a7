"""Torch's product in the forward of a linear layer or a convolution: watched, and by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tinyq_lightning.layers.behaviour import LEADS
from tinyq_lightning.layers.own_padding import OwnPadding

__all__ = [
    "PRODUCTS",
    "StopError",
    "Watch",
    "input_for",
    "product_of",
    "torchs_class",
]

PRODUCTS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: nn.functional.linear,
    nn.Conv1d: torch.conv1d,
    nn.Conv2d: torch.conv2d,
    nn.Conv3d: torch.conv3d,
}

_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")

# Places of a large input beyond what the kernel covers; in three dimensions.
_MORE, _MORE_IN_THREE = 61, 13


def torchs_class(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch that a layer is of, if its product can be watched."""
    return next((base for base in PRODUCTS if isinstance(module, base)), None)


class StopError(Exception):
    """The weight is known, and nothing else was asked for."""


class Watch(TorchFunctionMode):
    """Notes the arguments of each product of a kind inside the block.

    Args:
        product: torch's function.
        stops: raise instead of computing it.
    """

    def __init__(self, product: Callable[..., Tensor], stops: bool = False) -> None:
        super().__init__()
        self._product, self._stops = product, stops
        self.calls: list[dict[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is self._product:
            self.calls.append({**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs})
            if self._stops:
                raise StopError
        return func(*args, **kwargs)


def product_of(base: Any, layer: Any, x: Tensor, weight: Tensor, padding: OwnPadding | None) -> Tensor:
    """Torch's own product of a layer's input and a weight."""
    if base is nn.Linear:
        return nn.functional.linear(x, weight, layer.bias)
    if padding is None:
        return cast(Tensor, base._conv_forward(layer, x, weight, layer.bias))
    x = nn.functional.pad(x, padding.ends_for(layer, x.shape[2:]), padding.mode)
    return PRODUCTS[base](x, weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups)


def input_for(
    layer: Any, index: int, dtype: torch.dtype, device: torch.device | str = "cpu", amount: int = 8
) -> Tensor:
    """An input of zeros; by its index of another size.

    Args:
        layer: linear or a convolution.
        index: up to ``amount``. The first has what the kernel covers in its first dimension, the last but one is of
            one place, the last is large.
        dtype: of the input.
        device: of the input.
        amount: of inputs but for the large one. Those before the last two have all sizes from what the kernel covers
            on, in each dimension, and differ among the dimensions.
    """
    if isinstance(layer, nn.Linear):
        return torch.zeros((*LEADS[index % len(LEADS)], layer.in_features), dtype=dtype, device=device)
    count = amount - 1
    more = index, count - 1 - index, (index + 1) % count
    covered = [gap * (width - 1) + 1 for width, gap in zip(layer.kernel_size, layer.dilation, strict=True)]
    if index > count:
        more = (_MORE if len(covered) < 3 else _MORE_IN_THREE,) * 3
    sizes = [1 if index == count else size + more[dim] for dim, size in enumerate(covered)]
    return torch.zeros((2, layer.in_channels, *sizes), dtype=dtype, device=device)
