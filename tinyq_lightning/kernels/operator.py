"""Packed layers as one operator in graphs of ``torch.compile``.

Packed weights are nothing that a graph can hold, so it holds the number of a layer, and the layer runs
as it does outside. The operator's gradient is that of its input; biases that want one are added outside.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

__all__ = [
    "NumberedLayer",
    "number_layer",
    "packed_layer",
]


class NumberedLayer(Protocol):
    """What the operator needs of a layer."""

    in_features: int

    def __call__(self, input: Tensor) -> Tensor:
        """``[..., in]`` → ``[..., out]``."""

    def input_gradient(self, grad: Tensor) -> Tensor:
        """The gradient of the input ``[..., in]`` from that of the output ``[..., out]``."""


_numbers = itertools.count()


_layers: WeakValueDictionary[int, Any] = WeakValueDictionary()


def number_layer(layer: NumberedLayer) -> int:
    """A number for a layer, by which graphs find it while it lives."""
    number = next(_numbers)
    _layers[number] = layer
    return number


def packed_layer(input: Tensor, number: int, out_features: int, dtype: torch.dtype) -> Tensor:
    """The layer of that number on ``input``, as one operator: ``[..., in]`` → ``[..., out]`` of ``dtype``."""
    return torch.ops.tinyq_lightning.packed_layer.default(input, number, out_features, dtype)  # type: ignore[no-any-return]


_library = torch.library.Library("tinyq_lightning", "DEF")  # type: ignore[no-untyped-call]


_library.define("packed_layer(Tensor input, int number, int out_features, ScalarType dtype) -> Tensor")  # type: ignore[no-untyped-call]


_library.define("packed_layer_gradient(Tensor grad, int number, int in_features, ScalarType dtype) -> Tensor")  # type: ignore[no-untyped-call]


def _run(input: Tensor, number: int, out_features: int, dtype: torch.dtype) -> Tensor:
    layer = _layers[number]
    if torch.is_grad_enabled():
        with torch.no_grad():  # the operator has a gradient of its own
            out = layer(input)
    else:
        out = layer(input)
    return out if out.dtype is dtype else out.to(dtype)  # type: ignore[no-any-return]


def _run_gradient(grad: Tensor, number: int, in_features: int, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        return _layers[number].input_gradient(grad.float()).to(dtype)  # type: ignore[no-any-return]


def _like(input: Tensor, number: int, features: int, dtype: torch.dtype) -> Tensor:
    return input.new_empty((*input.shape[:-1], features), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, ctx.number, _, _ = inputs
    ctx.in_features, ctx.dtype = input.shape[-1], input.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradient = torch.ops.tinyq_lightning.packed_layer_gradient.default
    return gradient(grad, ctx.number, ctx.in_features, ctx.dtype), None, None, None


_kernels: dict[str, Callable[..., Tensor]] = {"packed_layer": _run, "packed_layer_gradient": _run_gradient}


for _name, _kernel in _kernels.items():
    _library.impl(_name, _kernel, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"tinyq_lightning::{_name}", _like, lib=_library)


torch.library.register_autograd("tinyq_lightning::packed_layer", _backward, setup_context=_setup_context, lib=_library)
