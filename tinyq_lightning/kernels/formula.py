"""The formula of each method, in floating point, on any device, dtype and processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tinyq_lightning.kernels.tracing import in_transform
from tinyq_lightning.kernels.weights import quantize_rows_to_steps
from tinyq_lightning.methods import METHODS, Method

__all__ = [
    "input_gradient",
    "quantized_linear",
    "w8_a8_forward",
    "w8_a16_forward",
    "w8_a32_forward",
]

# The formula rebuilds float weights block by block, 2 MiB at a time, so that they stay in cache.
_BLOCK_WEIGHTS = 524_288


def w8_a32_forward(input: Tensor, int8_weights: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer with int8 weights and activations as they are: ``(input @ qᵀ) * s + bias``.

    Args:
        input: ``[..., in]``, any floating dtype.
        int8_weights: ``[out, in]`` int8.
        scales: ``[out]`` float32.
        bias: ``[out]`` floating, or None.

    Returns:
        ``[..., out]`` of the input's dtype; computed in float32, float64 for float64 inputs.
    """
    return quantized_linear(METHODS["w8a32"], "reference", input, int8_weights, scales, bias)


def w8_a16_forward(input: Tensor, int8_weights: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer with int8 weights and 16-bit activations, quantized per token (row) as they come.

    Args:
        input: ``[..., in]``, any floating dtype.
        int8_weights: ``[out, in]`` int8.
        scales: ``[out]`` float32.
        bias: ``[out]`` floating, or None.

    Returns:
        ``[..., out]`` of the input's dtype; computed in float32, float64 for float64 inputs.
    """
    return quantized_linear(METHODS["w8a16"], "reference", input, int8_weights, scales, bias)


def w8_a8_forward(input: Tensor, int8_weights: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer with int8 weights and int8 activations, quantized per token (row) as they come.

    Args:
        input: ``[..., in]``, any floating dtype.
        int8_weights: ``[out, in]`` int8.
        scales: ``[out]`` float32.
        bias: ``[out]`` floating, or None.

    Returns:
        ``[..., out]`` of the input's dtype; computed in float32, float64 for float64 inputs.
    """
    return quantized_linear(METHODS["w8a8"], "reference", input, int8_weights, scales, bias)


def quantized_linear(
    method: Method,
    kernel: Literal["exact", "reference"],
    input: Tensor,
    int8_weights: Tensor,
    scales: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The forward pass of a quantized linear layer, from its codes.

    The result has the dtype ``nn.Linear`` would give: the input's, or autocast's inside autocast. What
    is inside is computed in float32 or better either way. Gradients reach the input and the bias; the
    rounding of activations is passed straight through (Bengio et al., 2013).

    Args:
        method: how finely activations are held.
        kernel: ``reference``, the formula; or ``exact``, with the activations as whole numbers (24 bits of them
            for w8a32) in float64, which holds the sums of their products exactly: a row has the same bits in any
            batch and for any number of threads.
        input: ``[..., in]``, any floating dtype.
        int8_weights: ``[out, in]`` int8.
        scales: ``[out]`` float32.
        bias: ``[out]`` floating, or None.

    Returns:
        ``[..., out]``.
    """
    if not input.is_floating_point():
        raise TypeError(f"the input of a quantized linear layer must have a floating dtype, not {input.dtype}")
    if input.dim() == 0 or input.shape[-1] != int8_weights.shape[1]:
        raise ValueError(f"the input must have shape [..., {int8_weights.shape[1]}], got {list(input.shape)}")
    device = input.device.type
    available = torch.amp.is_autocast_available(device)  # not on meta
    autocast = available and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast and input.dtype != torch.float64 else input.dtype
    work = torch.float64 if input.dtype == torch.float64 else torch.float32
    with torch.autocast(device, enabled=False) if available else nullcontext():
        x = input.to(work)
        if x.requires_grad and torch.is_grad_enabled():
            out = cast(Tensor, _StraightThrough.apply(x, int8_weights, scales, method, kernel))  # type: ignore[no-untyped-call]
        else:
            out = _product(kernel, method, x, int8_weights, scales)
        if bias is not None:
            out = out + bias.to(work)
        return out.to(dtype)


def input_gradient(grad: Tensor, int8_weights: Tensor, scales: Tensor) -> Tensor:
    """The gradient of a layer's input: ``grad @ (q * s)``.

    Args:
        grad: ``[..., out]`` float32 or float64, the gradient of its output.
        int8_weights: ``[out, in]`` int8.
        scales: ``[out]`` float32.

    Returns:
        ``[..., in]`` like ``grad``.
    """
    grad = grad * scales.to(grad.dtype)
    total = grad.new_zeros(*grad.shape[:-1], int8_weights.shape[1])
    if int8_weights.shape[1]:
        for rows in _blocks(int8_weights):
            total += grad[..., rows] @ int8_weights[rows].to(grad.dtype)
    return total


def _product(
    kernel: Literal["exact", "reference"], method: Method, x: Tensor, int8_weights: Tensor, scales: Tensor
) -> Tensor:
    if x.shape[-1] == 0:
        return x.new_zeros(*x.shape[:-1], int8_weights.shape[0])
    if not method.rounds and kernel == "reference":
        return _scaled_product(x, int8_weights, scales)
    whole, step = quantize_rows_to_steps(x, method.steps)
    if kernel == "exact":  # whole numbers below 2⁵³: the sums have no rounding, so no order either
        if method.digits == 1:  # to the bits that the other kernels have
            sums = _scaled_product(whole.double(), int8_weights, scales.new_ones((), dtype=torch.float64))
            return sums.to(x.dtype) * scales * step
        return (_scaled_product(whole.double(), int8_weights, scales.double()) * step).to(x.dtype)
    return _scaled_product(whole, int8_weights, scales) * step


def _scaled_product(x: Tensor, int8_weights: Tensor, scales: Tensor) -> Tensor:
    """``(x @ qᵀ) * s``, with the float copy of the weights made a block of rows at a time."""
    blocks = _blocks(int8_weights)
    if type(x) is not Tensor or torch.is_grad_enabled() or torch.compiler.is_compiling() or in_transform():
        parts = [nn.functional.linear(x, int8_weights[rows].to(x.dtype)) for rows in blocks]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)) * scales
    outputs, inputs = int8_weights.shape
    x_rows, copy = x.reshape(-1, inputs), None
    out = x.new_empty(len(x_rows), outputs)
    for rows in blocks:
        codes = int8_weights[rows]
        copy = x.new_empty(codes.shape) if copy is None else copy[: len(codes)]
        torch.mm(x_rows, copy.copy_(codes).t(), out=out[:, rows])
    return out.mul_(scales).view(*x.shape[:-1], outputs)


def _blocks(int8_weights: Tensor) -> Iterator[slice]:
    rows, columns = int8_weights.shape
    step = max(1, _BLOCK_WEIGHTS // columns)
    for start in range(0, max(1, rows), step):
        yield slice(start, min(start + step, rows))


class _StraightThrough(torch.autograd.Function):
    """The product with a gradient to the activations; keeps int8 weights for backward, not float ones."""

    @staticmethod
    def forward(
        x: Tensor, int8_weights: Tensor, scales: Tensor, method: Method, kernel: Literal["exact", "reference"]
    ) -> Tensor:
        return _product(kernel, method, x, int8_weights, scales)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], inputs[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        int8_weights, scales = ctx.saved_tensors
        return input_gradient(grad, int8_weights, scales), None, None, None, None
