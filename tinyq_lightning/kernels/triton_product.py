"""The product of activations as they are by plain codes, in one kernel of Triton: codes are expanded in registers.

Imported only where Triton is; :mod:`~tinyq_lightning.kernels.fused` asks whether it is to be used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "fused_product",
]

# Few rows are read once for each block of outputs; narrow blocks give each processor of a GPU one.
_ROWS, _OUTPUTS, _FEATURES = 16, 32, 128


def fused_product(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``(x @ qᵀ) * s + bias``, summed in float32 and rounded once.

    Codes are exact in bfloat16 and in float16, and so are their products with ``x``. Those of float32 are computed in
    float32, never in TF32.

    Args:
        x: ``[rows, in]`` float32, bfloat16 or float16, contiguous.
        codes: ``q``, ``[out, in]`` int8, contiguous.
        scales: ``s``, ``[out]`` float32.
        bias: ``[out]`` floating, of any stride, or None.

    Returns:
        ``[rows, out]`` of the dtype of ``x``.
    """
    (rows, features), outputs = x.shape, len(codes)
    out = x.new_empty(rows, outputs)
    if out.numel():
        grid = triton.cdiv(outputs, _OUTPUTS), triton.cdiv(rows, _ROWS)
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            _kernel[grid](
                x, codes, scales, scales if bias is None else bias.contiguous(), out, rows, outputs, features,
                bias is not None, _ROWS, _OUTPUTS, _FEATURES,
            )  # fmt: skip
    return out


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _kernel(  # type: ignore[no-untyped-def]  # Triton compiles annotations too
    x,
    codes,
    scales,
    bias,
    out,
    rows,
    outputs,
    features,
    has_bias: tl.constexpr,
    block_rows: tl.constexpr,
    block_outputs: tl.constexpr,
    block_features: tl.constexpr,
):
    n = (tl.program_id(0) * block_outputs + tl.arange(0, block_outputs)).to(tl.int64)
    m = (tl.program_id(1) * block_rows + tl.arange(0, block_rows)).to(tl.int64)
    k = tl.arange(0, block_features)
    sums = tl.zeros((block_rows, block_outputs), dtype=tl.float32)
    for start in range(0, features, block_features):
        at = start + k
        numbers = tl.load(x + m[:, None] * features + at, mask=(m[:, None] < rows) & (at < features), other=0.0)
        weights = tl.load(
            codes + n[None, :] * features + at[:, None], mask=(n[None, :] < outputs) & (at[:, None] < features), other=0
        )
        sums = tl.dot(numbers, weights.to(numbers.dtype), sums, input_precision="ieee")
    sums = sums * tl.load(scales + n, mask=n < outputs, other=0.0)
    if has_bias:
        sums = sums + tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)
    place = out + m[:, None] * outputs + n[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=(m[:, None] < rows) & (n[None, :] < outputs))
