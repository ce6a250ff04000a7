"""The gradient of a quantized linear layer, the same for every kernel: ``grad @ (q * s)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tinyq_lightning.kernels.base import WeightForm
from tinyq_lightning.kernels.weights import dequantize

__all__ = [
    "HALF_DTYPES",
    "StraightThrough",
    "input_gradient",
    "row_blocks",
]

# Float weights are rebuilt block by block, 2 MiB at a time, so that they stay in the cache. On a GPU a block is what
# a call may take beyond the layers' memory, 128 MiB: many small products would leave it idle.
_BLOCK_WEIGHTS, _BLOCK_WEIGHTS_ON_GPU = 524_288, 2**25


HALF_DTYPES = frozenset((torch.float16, torch.bfloat16))
"""What a GPU computes in, if activations come so; on a CPU products are computed in float32."""


def row_blocks(codes: Tensor) -> Iterator[slice]:
    """Slices of rows of ``codes`` ``[out, in]``, each of about 2 MiB as float32, on a GPU 128 MiB; at least one."""
    rows, columns = codes.shape
    step = max(1, (_BLOCK_WEIGHTS_ON_GPU if codes.is_cuda else _BLOCK_WEIGHTS) // columns)
    for start in range(0, max(1, rows), step):
        yield slice(start, min(start + step, rows))


def input_gradient(grad: Tensor, int8_weights: Tensor, scales: Tensor) -> Tensor:
    """The gradient of a layer's input: ``grad @ (q * s)``.

    Args:
        grad: ``[..., out]``, the gradient of its output, of the dtype that is computed in.
        int8_weights: ``[out, in]`` int8.
        scales: ``[out]`` float32.

    Returns:
        ``[..., in]`` like ``grad``.
    """
    if not int8_weights.shape[1]:
        return grad.new_zeros(*grad.shape[:-1], 0)
    half = grad.dtype in HALF_DTYPES  # whose range may not hold the scales
    grad = grad if half else grad * scales.to(grad.dtype)
    total: Tensor | None = None
    for rows in row_blocks(int8_weights):
        codes = int8_weights[rows]
        weight = dequantize(codes, scales[rows], grad.dtype) if half else codes.to(grad.dtype)
        part = grad.narrow(-1, rows.start, rows.stop - rows.start) @ weight
        total = part if total is None else total + part  # not in place: vmap refuses that
    assert total is not None
    return total


class StraightThrough(torch.autograd.Function):
    """A product with :func:`input_gradient` as its gradient, so that rounding is passed straight through.

    Keeps the int8 weights for backward, not float ones. Backward is made of torch's operators, so it can be
    differentiated again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor | WeightForm, scales: Tensor, product: Callable[..., Tensor], *more: Any
    ) -> Tensor:
        """``product(x, weights, scales, *more)``: ``[..., in]`` → ``[..., out]``; ``more`` gets no gradient."""
        ctx.form = weights if isinstance(weights, WeightForm) else None
        ctx.count = len(more)
        ctx.save_for_backward(weights if ctx.form is None else None, scales)
        return product(x, weights, scales, *more)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of ``x``; None for the rest."""
        codes, scales = ctx.saved_tensors
        if codes is None:
            codes = ctx.form.codes()
        return input_gradient(grad, codes, scales), None, None, None, *([None] * ctx.count)
