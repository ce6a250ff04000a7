"""The formula of each method, in floating point, on any device, dtype and processor.

On a GPU TF32, if the user has chosen it, cuts numbers to eleven bits before they are multiplied. A method that rounds
activations would mean another thing then, so that its products are of float64, or of integers; ``w8a32`` follows the
user's choice, as a float layer does.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from tinyq_lightning.kernels.autocast import autocast_dtype
from tinyq_lightning.kernels.base import Choice, Kernel, LayerShape
from tinyq_lightning.kernels.gradient import HALF_DTYPES, StraightThrough, row_blocks
from tinyq_lightning.kernels.integer import integer_product
from tinyq_lightning.kernels.tracing import in_transform, is_exporting, without_gradient
from tinyq_lightning.kernels.weights import dequantize, quantize_rows_to_steps
from tinyq_lightning.methods import METHODS, Method

__all__ = [
    "FORMULA",
    "FormulaName",
    "quantized_linear",
    "w8_a8_forward",
    "w8_a16_forward",
    "w8_a32_forward",
]

FormulaName = Literal["exact", "reference", "integer"]


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
    kernel: FormulaName,
    input: Tensor,
    int8_weights: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    differentiable: bool = False,
) -> Tensor:
    """The forward pass of a quantized linear layer, from its codes.

    The result has the dtype ``nn.Linear`` would give: the input's, or autocast's inside autocast. The
    computation is in float32 or better either way, except that a GPU multiplies activations as they are by weights of
    the result's dtype. Gradients reach the input and the bias; the rounding of activations is passed straight through
    (Bengio et al., 2013).

    Args:
        method: how finely activations are held.
        kernel: ``reference``, the formula; ``exact``, with the activations as integers (of 24 bits for w8a32) in
            float64, which holds the sums of their products exactly: a row has the same bits in any batch and for any
            number of threads; ``integer``, the same by int8 products, where
            :func:`~tinyq_lightning.kernels.integer.takes_integers` allows it and the input is not float64.
        input: ``[..., in]``, any floating dtype.
        int8_weights: ``[out, in]`` int8.
        scales: ``[out]`` float32.
        bias: ``[out]`` floating, or None.
        differentiable: use only operators that torch can differentiate, instead of an autograd function. Transforms
            such as ``vmap`` and ``jit.trace`` get these in any case.

    Returns:
        ``[..., out]``.
    """
    if not input.is_floating_point():
        raise TypeError(f"the input of a quantized linear layer must have a floating dtype, not {input.dtype}")
    if input.dim() == 0 or input.shape[-1] != int8_weights.shape[1]:
        raise ValueError(f"the input must have shape [..., {int8_weights.shape[1]}], got {list(input.shape)}")
    device = input.device.type
    autocast = autocast_dtype(device)
    dtype = autocast if autocast is not None and input.dtype != torch.float64 else input.dtype
    work = torch.float64 if input.dtype == torch.float64 else torch.float32
    if device == "cuda" and not method.rounds and kernel == "reference":
        work = dtype
    with torch.autocast(device, enabled=False) if autocast is not None else nullcontext():
        x = input.to(work)
        if kernel == "integer" and is_exporting():  # no gradients in an exported program, and no function for them
            out = integer_product(x, int8_weights, scales, method)
        elif differentiable or is_exporting() or (not torch.compiler.is_compiling() and in_transform()):
            out = _product(x, int8_weights, scales, method, "reference" if kernel == "integer" else kernel, True)
        elif x.requires_grad and torch.is_grad_enabled():
            straight = StraightThrough.apply(x, int8_weights, scales, _product, method, kernel)  # type: ignore[no-untyped-call]
            out = cast(Tensor, straight)
        else:
            out = _product(x, int8_weights, scales, method, kernel)
        if bias is not None:
            out = out + bias.to(work)
        return out.to(dtype)


def _product(
    x: Tensor, int8_weights: Tensor, scales: Tensor, method: Method, kernel: FormulaName, differentiable: bool = False
) -> Tensor:
    """``x @ (q * s)ᵀ``: ``[..., in]`` → ``[..., out]``, both of the dtype that is computed in."""
    if x.shape[-1] == 0:
        return x.new_zeros(*x.shape[:-1], int8_weights.shape[0])
    if kernel == "integer":
        return integer_product(x, int8_weights, scales, method)
    if not method.rounds and kernel == "reference":
        return _scaled_product(x, int8_weights, scales)
    if x.is_cuda:
        kernel = "exact"
    integers, step = _rounded_straight(x, method.steps) if differentiable else quantize_rows_to_steps(x, method.steps)
    if kernel == "exact":  # integers below 2⁵³: their sums are not rounded, so their order does not matter
        if method.digits == 1:  # to the bits that the other kernels have
            sums = _scaled_product(integers.double(), int8_weights, scales.new_ones((), dtype=torch.float64))
            return sums.to(x.dtype) * scales * step
        return (_scaled_product(integers.double(), int8_weights, scales.double()) * step).to(x.dtype)
    return _scaled_product(integers, int8_weights, scales) * step


def _rounded_straight(x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """As ``quantize_rows_to_steps``, with the same bits, and a derivative as if nothing was rounded."""
    integers, step = quantize_rows_to_steps(without_gradient(x), steps)
    unrounded = x / step
    # The difference and the sum are exact in floating point, because an integer is at most half from its quotient.
    return unrounded + without_gradient(integers - unrounded), step


def _scaled_product(x: Tensor, int8_weights: Tensor, scales: Tensor) -> Tensor:
    """``(x @ qᵀ) * s``, with the float copy of the weights made a block of rows at a time."""
    blocks = row_blocks(int8_weights)
    if x.dtype in HALF_DTYPES:  # sums of codes may be beyond their range
        parts = [nn.functional.linear(x, dequantize(int8_weights[rows], scales[rows], x.dtype)) for rows in blocks]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    if (
        not x.is_cpu
        or type(x) is not Tensor
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or in_transform()
    ):
        # in a graph not of slices: a package would hold the codes once for each
        whole = int8_weights.to(x.dtype) if torch.compiler.is_compiling() else None
        copies = (int8_weights[rows].to(x.dtype) if whole is None else whole[rows] for rows in blocks)
        parts = [nn.functional.linear(x, copy) for copy in copies]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)) * scales
    outputs, inputs = int8_weights.shape
    x_rows, copy = x.reshape(-1, inputs), None
    out = x.new_empty(len(x_rows), outputs)
    for rows in blocks:
        codes = int8_weights[rows]
        copy = x.new_empty(codes.shape) if copy is None else copy[: len(codes)]
        torch.mm(x_rows, copy.copy_(codes).t(), out=out[:, rows])
    return out.mul_(scales).view(*x.shape[:-1], outputs)


class _Formula(Kernel):
    name = "reference"
    devices = None

    @override
    def lacks(self, layer: LayerShape) -> str:
        return ""

    @override
    def variant(self, layer: LayerShape) -> str:
        return "reference"

    @override
    def fastest(self, layer: LayerShape, lacking: str) -> Choice | None:
        if layer.device == "cuda" and not layer.method.rounds:
            return Choice("reference", "one byte a weight in memory, expanded on each call")
        return Choice("reference", lacking or "no other kernel for this device")


FORMULA = _Formula()
"""The formula on plain codes, which runs everywhere."""
