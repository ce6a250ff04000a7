"""The forward pass over packed weights, on the CPU, outside of graphs that are being traced."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tinyq_lightning.forward.methods import Method
from tinyq_lightning.forward.packed import Float32Weights, WeightForm

__all__ = ["INPUT_DTYPES", "packed_linear"]

INPUT_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
"""What packed weights multiply; float64 is left to the formula."""


def packed_linear(method: Method, form: WeightForm, input: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """As :func:`~tinyq_lightning.forward.reference.quantized_linear`, by the kernel that the weights are packed for.

    Args:
        method: how finely activations are held.
        form: the weights ``[out, in]``.
        input: ``[..., in]`` of one of ``INPUT_DTYPES``, on the CPU.
        scales: ``[out]`` float32.
        bias: ``[out]`` floating, or None.

    Returns:
        ``[..., out]`` of the input's dtype, or autocast's; computed in float32.
    """
    dtype, autocast = input.dtype, torch.is_autocast_enabled("cpu")
    if dtype is torch.float32 and not autocast and (bias is None or bias.dtype is torch.float32):
        if type(form) is Float32Weights and not method.rounds:  # as nn.Linear, and as fast
            return nn.functional.linear(input, form.weight, bias)
        if input.dim() == 2 and input.shape[0] and input.is_contiguous() and not torch.is_grad_enabled():
            return form.product(method, input, scales, bias)
    with torch.autocast("cpu", enabled=False) if autocast else nullcontext():
        out_features, in_features = scales.shape[0], input.shape[-1]
        x = input.float().reshape(-1, in_features).contiguous()
        grad = torch.is_grad_enabled()
        apart = bias is not None and grad and bias.requires_grad
        inside = None if apart or bias is None else bias.float()
        if grad and x.requires_grad:
            out = cast(Tensor, _StraightThrough.apply(x, method, form, scales, inside))  # type: ignore[no-untyped-call]
        else:
            out = _product(x, method, form, scales, inside)
        if apart:
            out = out + bias.float()  # type: ignore[union-attr]
        out = out.view(*input.shape[:-1], out_features)
        return out.to(torch.get_autocast_dtype("cpu") if autocast else dtype)


def _product(x: Tensor, method: Method, form: WeightForm, scales: Tensor, bias: Tensor | None) -> Tensor:
    if not len(x):
        return x.new_zeros(0, len(scales))
    return form.product(method, x, scales, bias)


class _StraightThrough(torch.autograd.Function):
    """The product with a gradient to the activations, whose rounding is passed straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, method: Method, form: WeightForm, scales: Tensor, bias: Tensor | None) -> Tensor:
        ctx.form, ctx.scales = form, scales
        return _product(x, method, form, scales, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.form.gradient(grad, ctx.scales), None, None, None, None
