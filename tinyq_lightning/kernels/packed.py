"""The forward pass over the form of the weights that a kernel takes, outside of graphs that are being traced."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from tinyq_lightning.kernels.base import WeightForm
from tinyq_lightning.kernels.gradient import StraightThrough
from tinyq_lightning.methods import Method

__all__ = [
    "INPUT_DTYPES",
    "packed_linear",
]

INPUT_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
"""Inputs that kernels with a form of their own multiply; float64 takes the formula."""


def packed_linear(method: Method, form: WeightForm, input: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """As :func:`~tinyq_lightning.kernels.formula.quantized_linear`, by the kernel that the form is made for.

    Args:
        method: how finely activations are held.
        form: the weights ``[out, in]``.
        input: ``[..., in]`` of one of ``INPUT_DTYPES``, on the form's device.
        scales: ``[out]`` float32.
        bias: ``[out]`` floating, or None.

    Returns:
        ``[..., out]`` of the input's dtype, or autocast's; summed in float32.
    """
    device = "cpu" if input.is_cpu else input.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            out = packed_linear(method, form, input.to(dtype) if form.any_dtype else input.float(), scales, bias)
        return out.to(dtype)
    dtype = input.dtype
    x = input if dtype is torch.float32 or form.any_dtype else input.float()
    if torch.is_grad_enabled():
        out = _with_gradients(x, method, form, scales, bias)
    else:
        out = _product(x, form, scales, method, bias)
    if dtype is torch.float32:
        return out
    return out.bfloat16() if dtype is torch.bfloat16 else out.half()


def _product(x: Tensor, form: WeightForm, scales: Tensor, method: Method, bias: Tensor | None) -> Tensor:
    """``[..., in]`` → ``[..., out]``, float32 or what else the form takes."""
    if x.dim() == 2 and x.shape[0] and x.is_contiguous():
        return form.product(method, x, scales, bias)
    *batch, in_features = x.shape
    rows = x.reshape(-1, in_features).contiguous()
    out = form.product(method, rows, scales, bias) if rows.shape[0] else x.new_empty(0, scales.shape[0])
    return out.view(*batch, scales.shape[0])


def _with_gradients(x: Tensor, method: Method, form: WeightForm, scales: Tensor, bias: Tensor | None) -> Tensor:
    inside = None if bias is None or bias.requires_grad else bias
    if x.requires_grad:
        out = cast(Tensor, StraightThrough.apply(x, form, scales, _product, method, inside))  # type: ignore[no-untyped-call]
    else:
        out = _product(x, form, scales, method, inside)
    return out if bias is inside else out + bias.float()  # type: ignore[union-attr]
