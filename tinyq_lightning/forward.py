"""Quantized forward pass functions, and the choice among kernels.

Each method is one function of ``(input, int8_weights, scales, bias)``. They differ only in how finely
the activations are held; weights are int8 with one float32 scale per output row in all of them:

====== ===================== =========================================================
method activations           formula (``q`` int8 weights, ``s`` their scales)
====== ===================== =========================================================
w8a32  32-bit, as they are   ``(x @ qᵀ) * s + bias``
w8a16  16-bit per token      ``(round(x / a) @ qᵀ) * a * s + bias``, ``a = max|x| / 32512``
w8a8   8-bit per token       ``(round(x / a) @ qᵀ) * a * s + bias``, ``a = max|x| / 127``
====== ===================== =========================================================

Kernels: ``reference`` is the formula above, in floating point, on any device and dtype. ``int8`` holds
the activations as whole numbers (w8a32: 24 bits) and sums whole products exactly, so a row's result has
the same bits in any batch and for any number of threads; where the processor has no fast int8 product
it is computed in float64, which holds these sums exactly. ``auto`` picks the fastest; see
:func:`choose_kernel`, the one place where that is decided.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tinyq_lightning.weight_math import quantize_rows_to_steps

__all__ = [
    "KERNELS",
    "METHODS",
    "KernelName",
    "Method",
    "choose_kernel",
    "quantized_linear",
    "w8_a8_forward",
    "w8_a16_forward",
    "w8_a32_forward",
]

KernelName = Literal["auto", "int8", "reference"]
KERNELS: tuple[KernelName, ...] = ("auto", "int8", "reference")


@dataclass(frozen=True)
class Method:
    """How one method holds its activations.

    Attributes:
        name: as users write it.
        steps: largest whole number of the activations' fixed point: base-256 digits of one byte each.
        float_activations: the reference formula takes the activations as they are.
    """

    name: str
    steps: int
    float_activations: bool = False


METHODS = {
    method.name: method
    for method in (
        Method("w8a32", 127 * 256 * 256, float_activations=True),
        Method("w8a16", 127 * 256),
        Method("w8a8", 127),
    )
}

# The formula rebuilds float weights block by block, 4 MiB at a time, so that they stay in cache.
_BLOCK_WEIGHTS = 1_048_576


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


def choose_kernel(kernel: KernelName) -> Literal["int8", "reference"]:
    """Which kernel runs where ``kernel`` was asked for. Fast kernels are entered here and nowhere else."""
    return "int8" if kernel == "int8" else "reference"


def quantized_linear(
    method: Method,
    kernel: KernelName,
    input: Tensor,
    int8_weights: Tensor,
    scales: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The forward pass of every quantized layer.

    The result has the dtype ``nn.Linear`` would give: the input's, or autocast's inside autocast. What
    is inside is computed in float32 or better either way. Gradients reach the input and the bias; the
    rounding of activations is passed straight through (Bengio et al., 2013).

    Args:
        method: how finely activations are held.
        kernel: which kernel was asked for.
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
            out = _product(method, kernel, x, int8_weights, scales)
        if bias is not None:
            out = out + bias.to(work)
        return out.to(dtype)


def _product(method: Method, kernel: KernelName, x: Tensor, int8_weights: Tensor, scales: Tensor) -> Tensor:
    if x.shape[-1] == 0:
        return x.new_zeros(*x.shape[:-1], int8_weights.shape[0])
    exact = choose_kernel(kernel) == "int8"
    if method.float_activations and not exact:
        return _scaled_product(x, int8_weights, scales)
    whole, step = quantize_rows_to_steps(x, method.steps)
    if exact:  # whole numbers below 2⁵³: the sums have no rounding, so no order either
        return (_scaled_product(whole.double(), int8_weights, scales.double()) * step).to(x.dtype)
    return _scaled_product(whole, int8_weights, scales) * step


def _scaled_product(x: Tensor, int8_weights: Tensor, scales: Tensor) -> Tensor:
    """``(x @ qᵀ) * s``, with the float copy of the weights made a block of rows at a time."""
    parts = [nn.functional.linear(x, int8_weights[rows].to(x.dtype)) * scales[rows] for rows in _blocks(int8_weights)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _blocks(int8_weights: Tensor) -> Iterator[slice]:
    rows, columns = int8_weights.shape
    step = max(1, _BLOCK_WEIGHTS // columns)
    for start in range(0, max(1, rows), step):
        yield slice(start, min(start + step, rows))


class _StraightThrough(torch.autograd.Function):
    """The product with a gradient to the activations; keeps int8 weights for backward, not float ones."""

    @staticmethod
    def forward(x: Tensor, int8_weights: Tensor, scales: Tensor, method: Method, kernel: KernelName) -> Tensor:
        return _product(method, kernel, x, int8_weights, scales)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], inputs[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        int8_weights, scales = ctx.saved_tensors
        grad = grad * scales.to(grad.dtype)
        total = grad.new_zeros(*grad.shape[:-1], int8_weights.shape[1])
        if int8_weights.shape[1]:
            for rows in _blocks(int8_weights):
                total += grad[..., rows] @ int8_weights[rows].to(grad.dtype)
        return total, None, None, None, None
