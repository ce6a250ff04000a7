"""Convolutions with int8 weights: their formula in floating point, on any device, dtype and processor.

Activations are rounded per sample: one step for all that a sample holds, because each output takes values from many
places. Padding is zero, which is a whole number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from tinyq_lightning.kernels.autocast import autocast_dtype
from tinyq_lightning.kernels.base import SUM_MAX, WeightForm
from tinyq_lightning.kernels.conv_layout import LAYOUTS
from tinyq_lightning.kernels.integer import digits_of_integers, int_mm, put_together, scaled_sums
from tinyq_lightning.kernels.tracing import in_transform, is_exporting, without_gradient
from tinyq_lightning.kernels.weights import CODE_MAX, dequantize, divisor
from tinyq_lightning.methods import Method

__all__ = [
    "ConvFormulaName",
    "Geometry",
    "StraightConvolution",
    "convolve",
    "output_sizes",
    "per_channel",
    "quantized_convolution",
    "sample_steps",
    "strided",
]

ConvFormulaName = Literal["exact", "reference", "integer"]

# What windows take in memory on a GPU: samples are taken one after the other if they take more.
_WINDOW_BYTES = 2**28

_CONVOLUTIONS = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}

_TRANSPOSED = {
    1: nn.functional.conv_transpose1d,
    2: nn.functional.conv_transpose2d,
    3: nn.functional.conv_transpose3d,
}


@dataclass(frozen=True)
class Geometry:
    """How a convolution moves over its input.

    Attributes:
        stride: in each dimension.
        padding: zeros at both ends of each dimension.
        dilation: in each dimension.
        groups: of channels.
        transposed: whether it is a transposed convolution, whose weight is ``[in, out / groups, ...]``.
        output_padding: of a transposed convolution, in each dimension.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def transposed_groups(self) -> int:
        """The groups of a transposed convolution; 0 for others. As :func:`dequantize` takes it."""
        return self.groups if self.transposed else 0


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Torch's own convolution: ``[N, in, ...]``, weight ``[out, in / groups, ...]`` → ``[N, out, ...]``."""
    if geometry.transposed:
        if x.dtype == torch.float64 and 0 in _transposed_sizes(x, weight, geometry):
            # torch makes an empty output in float32, and raises in float64
            return convolve(x.float(), weight.float(), None, geometry).to(x.dtype)
        return _TRANSPOSED[x.dim() - 2](
            x,
            weight,
            bias,
            geometry.stride,
            geometry.padding,
            geometry.output_padding,
            geometry.groups,
            geometry.dilation,
        )
    return _CONVOLUTIONS[x.dim() - 2](
        x, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    )


def output_sizes(sizes: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry) -> tuple[int, ...]:
    """The sizes of the output in each dimension, of a convolution that is not transposed."""
    parts = zip(sizes, kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True)
    return tuple((size + 2 * pad - gap * (width - 1) - 1) // stride + 1 for size, width, stride, pad, gap in parts)


def _transposed_sizes(x: Tensor, weight: Tensor, geometry: Geometry) -> list[int]:
    """The sizes of the output of a transposed convolution in each dimension."""
    moves = zip(geometry.stride, geometry.padding, geometry.dilation, geometry.output_padding, strict=True)
    sizes = zip(x.shape[2:], weight.shape[2:], moves, strict=True)
    return [(n - 1) * stride - 2 * pad + gap * (k - 1) + more + 1 for n, k, (stride, pad, gap, more) in sizes]


def per_channel(values: Tensor, dims: int) -> Tensor:
    """Values ``[out]`` in a shape that broadcasts over an output of so many dimensions."""
    return values.view(-1, *[1] * (dims - 2))


def strided(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The places of ``x`` ``[N, C, ...]`` that windows of one place see."""
    for dim, each in enumerate(stride, 2):
        if each > 1:
            x = x[(slice(None),) * dim + (slice(None, None, each),)]
    return x


def sample_steps(x: Tensor, steps: int | Tensor) -> Tensor:
    """The size of one step in each sample of fixed point: ``max|sample| / steps``.

    Args:
        x: ``[N, C, ...]`` float32 or float64.
        steps: largest whole number.

    Returns:
        ``[N, 1, ...]`` like ``x``, positive; not finite where the sample is not.
    """
    largest = x.abs().amax(tuple(range(1, x.dim())), True)
    return largest.div_(divisor(largest, steps)).clamp_min_(2.0**-126)  # a literal, as in activation_steps


def quantized_convolution(
    method: Method,
    kernel: ConvFormulaName,
    input: Tensor,
    int8_weights: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    differentiable: bool = False,
) -> Tensor:
    """The forward pass of a quantized convolution, from its codes.

    The result has the dtype that torch's layer would give: the input's, or autocast's inside autocast. Methods that
    round compute in float32 or better. Gradients reach the input and the bias; rounding is passed straight through.

    Args:
        method: how finely activations are held.
        kernel: ``reference``, the formula; ``exact``, with the activations as integers (of 24 bits for w8a32) in
            float64, which holds the sums of their products exactly; ``integer``, convolutions of one group by int8
            products, where :func:`~tinyq_lightning.kernels.integer.takes_integers` allows it. Sums of w8a8 are exact
            by each of them; so are those of w8a16 on a GPU, whose float32 may be TF32 or Winograd's.
        input: ``[N, in, ...]``, any floating dtype.
        int8_weights: ``[out, in / groups, ...]`` int8, or ``[in, out / groups, ...]`` if transposed.
        scales: ``[out]`` float32.
        bias: ``[out]`` floating, or None.
        geometry: how the convolution moves over the input.
        differentiable: use only operators that torch can differentiate, instead of an autograd function. Transforms
            such as ``vmap`` and ``jit.trace`` get these in any case.

    Returns:
        ``[N, out, ...]``.
    """
    device = input.device.type
    autocast = autocast_dtype(device)
    dtype = autocast if autocast is not None and input.dtype != torch.float64 else input.dtype
    work = torch.float64 if input.dtype == torch.float64 else torch.float32
    if not method.rounds and kernel == "reference":
        work = dtype
    with torch.autocast(device, enabled=False) if autocast is not None else nullcontext():
        x, added = input.to(work), None if bias is None else bias.to(work)
        if differentiable or is_exporting() or (not torch.compiler.is_compiling() and in_transform()):
            kernel = "reference" if kernel == "integer" else kernel
            out = _product(x, added, int8_weights, scales, geometry, method, kernel, True)
        elif torch.is_grad_enabled() and (x.requires_grad or (added is not None and added.requires_grad)):
            straight = StraightConvolution.apply(  # type: ignore[no-untyped-call]
                x, added, int8_weights, scales, geometry, _product, method, kernel
            )
            out = cast(Tensor, straight)
        else:
            out = _product(x, added, int8_weights, scales, geometry, method, kernel)
        return out.to(dtype)


class StraightConvolution(torch.autograd.Function):
    """A convolution whose gradient is that of the dequantized weights: rounding is passed straight through.

    Keeps the int8 weights for backward, not float ones. Backward is made of torch's operators, so it can be
    differentiated again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        weights: Tensor | WeightForm,
        scales: Tensor,
        geometry: Geometry,
        product: Callable[..., Tensor],
        *more: Any,
    ) -> Tensor:
        """``product(x, bias, weights, scales, geometry, *more)``; only ``x`` and ``bias`` get gradients."""
        ctx.form = weights if isinstance(weights, WeightForm) else None
        ctx.geometry, ctx.sizes, ctx.count = geometry, x.shape, len(more)
        ctx.save_for_backward(weights if ctx.form is None else None, scales)
        return product(x, bias, weights, scales, geometry, *more)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of ``x`` and ``bias``; None for the rest."""
        codes, scales = ctx.saved_tensors
        if codes is None:
            codes = ctx.form.codes()
        of_x = _input_gradient(grad, ctx.sizes, codes, scales, ctx.geometry) if ctx.needs_input_grad[0] else None
        of_bias = grad.sum((0, *range(2, grad.dim()))) if ctx.needs_input_grad[1] else None
        return of_x, of_bias, *([None] * (4 + ctx.count))


def _input_gradient(grad: Tensor, sizes: torch.Size, codes: Tensor, scales: Tensor, geometry: Geometry) -> Tensor:
    weight = dequantize(codes, scales, grad.dtype, geometry.transposed_groups)
    gradients = torch.ops.aten.convolution_backward(
        grad,
        grad.new_empty(1).expand(sizes),
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.transposed,
        geometry.output_padding or [0] * len(geometry.stride),
        geometry.groups,
        (True, False, False),
    )
    return cast(Tensor, gradients[0])


def _product(
    x: Tensor,
    bias: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    geometry: Geometry,
    method: Method,
    kernel: ConvFormulaName,
    differentiable: bool = False,
) -> Tensor:
    """``[N, in, ...]`` → ``[N, out, ...]``, both of the dtype that is computed in."""
    if not method.rounds and kernel == "reference":
        return convolve(x, dequantize(codes, scales, x.dtype, geometry.transposed_groups), bias, geometry)
    step = sample_steps(without_gradient(x) if differentiable else x, method.steps)
    unrounded = x / step
    integers = torch.round(unrounded)
    if differentiable:  # the sum is exact, because an integer is at most half from its quotient
        integers = unrounded + without_gradient(integers - unrounded)
    out = _sums(integers, codes, scales, geometry, method, kernel).to(x.dtype) * step
    return out if bias is None else out + per_channel(bias, x.dim())


def _sums(
    integers: Tensor, codes: Tensor, scales: Tensor, geometry: Geometry, method: Method, kernel: ConvFormulaName
) -> Tensor:
    """The convolution of integers by codes, each channel times its scale, in float32 or float64."""
    if kernel == "integer":
        if codes[0, 0].numel() > 1 or any(geometry.padding):
            out = _window_sums(integers, codes, geometry, method)
            out = out * per_channel(scales, out.dim())
        else:
            out = _pointwise_sums(strided(integers, geometry.stride), codes, scales, method)
        layout = LAYOUTS.get(out.dim(), torch.contiguous_format)
        last = integers.is_contiguous(memory_format=layout) and not integers.is_contiguous()
        return out.contiguous(memory_format=layout if last else torch.contiguous_format)
    if integers.is_cuda:
        out = convolve(integers.double(), codes.double(), None, geometry)
        out = out.to(integers.dtype) if method.digits == 1 else out  # to the bits that int8 products give
        return out * per_channel(scales, out.dim())
    if kernel == "exact" and method.digits > 1:
        out = convolve(integers.double(), codes.double(), None, geometry)
        return out * per_channel(scales.double(), out.dim())
    if method.digits > 1:
        out = convolve(integers, codes.to(integers.dtype), None, geometry)
    elif integers.dtype == torch.float64:
        out = convolve(integers, codes.double(), None, geometry)
    else:
        out = _exact_sums(integers, codes, geometry)
    return out * per_channel(scales, out.dim())


def _exact_sums(integers: Tensor, codes: Tensor, geometry: Geometry) -> Tensor:
    """Exact sums of integers up to 127 in float32, which holds whole numbers up to 2²⁴: by blocks of the channels."""
    channels, places = codes.shape[1], codes[0, 0].numel()
    most = max(1, (SUM_MAX // CODE_MAX**2) // places)
    if channels <= most:
        return convolve(integers, codes.to(integers.dtype), None, geometry)
    if geometry.groups > 1 or geometry.transposed or most * places * CODE_MAX**2 > SUM_MAX:
        return convolve(integers.double(), codes.double(), None, geometry).to(integers.dtype)
    total: Tensor | None = None
    # in a graph not of slices: a package would hold the codes once for each
    whole = codes.to(integers.dtype) if torch.compiler.is_compiling() else None
    for start in range(0, channels, most):
        block = slice(start, start + most)
        weight = codes[:, block].to(integers.dtype) if whole is None else whole[:, block]
        part = convolve(integers[:, block], weight, None, geometry).double()
        total = part if total is None else total + part
    assert total is not None
    return total.to(integers.dtype)


def _window_sums(integers: Tensor, codes: Tensor, geometry: Geometry, method: Method) -> Tensor:
    """The convolution of integers by codes in one group, with the digits of each window as a row of an int8 product."""
    kernel = tuple(codes.shape[2:])
    sizes = output_sizes(tuple(integers.shape[2:]), kernel, geometry)
    samples = len(integers)
    if not torch.compiler.is_compiling():
        samples = max(1, _WINDOW_BYTES // max(1, method.digits * math.prod(sizes) * codes[0].numel()))
    ends = [end for width in reversed(geometry.padding) for end in (width, width)]
    parts = []
    for part in torch.split(integers, max(1, samples)):
        digits = nn.functional.pad(digits_of_integers(part, method.digits), ends)
        for dim, (width, step, gap) in enumerate(zip(kernel, geometry.stride, geometry.dilation, strict=True), 2):
            digits = digits.unfold(dim, gap * (width - 1) + 1, step)[..., ::gap]
        windows = digits.movedim(1, 1 + len(kernel)).reshape(-1, codes[0].numel())
        sums = put_together(int_mm(windows, codes.flatten(1)).to(integers.dtype), method.digits)
        parts.append(sums.view(len(part), *sizes, len(codes)).movedim(-1, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _pointwise_sums(integers: Tensor, codes: Tensor, scales: Tensor, method: Method) -> Tensor:
    """As :func:`_sums` for a kernel of one place, no padding and one group, of the input at the windows alone."""
    samples, channels, *sizes = integers.shape
    rows = integers.flatten(2).transpose(1, 2).reshape(-1, channels)
    out = scaled_sums(rows, codes.flatten(1), scales, method)
    return out.view(samples, -1, len(codes)).transpose(1, 2).reshape(samples, len(codes), *sizes)
