"""Operators of ONNX in the forward passes that torch exports: those that torch has no operator for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tinyq_lightning.methods import Method

__all__ = [
    "OPSET",
    "dequantize_linear",
    "dequantized_product",
    "matmul_integer",
    "onnx_operator",
    "onnx_operators",
    "round_samples",
    "rounded_product",
]

OPSET = 21
"""The first with DequantizeLinear of every width and of blocks."""

_SMALLEST_STEP = torch.finfo(torch.float32).tiny


def onnx_operator(
    name: str, inputs: Sequence[Tensor | None], dtype: torch.dtype, shape: Sequence[Any], **attributes: Any
) -> Tensor:
    """One operator with one output of this dtype and shape."""
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape, version=OPSET)


def onnx_operators(
    name: str, inputs: Sequence[Tensor | None], outputs: Sequence[tuple[torch.dtype, Sequence[Any]]], **attributes: Any
) -> Sequence[Tensor]:
    """One operator with several outputs, each of a dtype and a shape."""
    return torch.onnx.ops.symbolic_multi_out(
        name,
        inputs,
        attributes,
        dtypes=[dtype for dtype, _ in outputs],
        shapes=[shape for _, shape in outputs],
        version=OPSET,
    )


def dequantize_linear(codes: Tensor, scales: Tensor, axis: int) -> Tensor:
    """``codes * scales`` along an axis: int8 → float32 of the same shape."""
    return onnx_operator("DequantizeLinear", (codes, scales), torch.float32, codes.shape, axis=axis)


def dequantized_product(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ (q * s) + bias`` as MatMul and Add.

    Matrices get a dimension more meanwhile: ONNX Runtime would make a Gemm of the two, for which it dequantizes the
    whole weight on each call.

    Args:
        x: ``[..., in]`` float32.
        codes: ``q``, ``[in, out]`` int8.
        scales: ``s``, ``[out]`` float32.
        bias: ``[out]`` floating, or None.

    Returns:
        ``[..., out]`` float32.
    """
    if x.dim() == 2:
        return dequantized_product(x.unsqueeze(0), codes, scales, bias).squeeze(0)
    weight = dequantize_linear(codes, scales, axis=1)
    out = onnx_operator("MatMul", (x, weight), torch.float32, (*x.shape[:-1], len(scales)))
    return out if bias is None else out + bias.float()


def matmul_integer(digits: Tensor, codes: Tensor) -> Tensor:
    """Products of uint8 digits, which stand for 128 less, and int8 codes: ``[..., in] @ [in, out]`` → float32."""
    zero_point = torch.full((), 128, dtype=torch.uint8)
    shape = (*digits.shape[:-1], codes.shape[1])
    return onnx_operator("MatMulInteger", (digits, codes, zero_point), torch.int32, shape).float()


def rounded_product(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, method: Method) -> Tensor:
    """``x @ (q * s) + bias`` with the activations of each token rounded to int8 digits.

    ONNX Runtime multiplies uint8 by int8 fast, and int8 by int8 slowly, so digits have 128 added, as their zero point.

    Args:
        x: ``[..., in]`` float32.
        codes: ``q``, ``[in, out]`` int8.
        scales: ``s``, ``[out]`` float32.
        bias: ``[out]`` floating, or None.
        method: one of one digit or two.

    Returns:
        ``[..., out]`` float32. A row with NaN or infinity gives no finite value.
    """
    step = (x.abs().amax(-1, keepdim=True) / method.steps).clamp_min(_SMALLEST_STEP)
    numbers = x / step
    if method.digits == 1:
        sums = matmul_integer(_digit(numbers), codes)
    else:
        integers = numbers.round()
        high = ((integers + 128) * (1 / 256)).floor()
        sums = matmul_integer(_digit(high), codes) * 256 + matmul_integer(_digit(integers - high * 256), codes)
    # The largest of a row with NaN need not be NaN in ONNX Runtime; the sum of its numbers is.
    out = sums * scales * (step + numbers.sum(-1, keepdim=True) * 0)
    return out if bias is None else out + bias.float()


def _digit(numbers: Tensor) -> Tensor:
    """Numbers rounded to −128…127, with 128 added: uint8."""
    one, zero_point = torch.full((), 1.0), torch.full((), 128, dtype=torch.uint8)
    return onnx_operator("QuantizeLinear", (numbers, one, zero_point), torch.uint8, numbers.shape)


def round_samples(x: Tensor, method: Method) -> Tensor:
    """Activations ``[N, ...]`` float32 rounded with one step for each sample, as convolutions take them."""
    step = x.abs().amax(tuple(range(1, x.dim())), keepdim=True) / method.steps
    step = step.clamp_min(_SMALLEST_STEP)
    return (x / step).round() * step
