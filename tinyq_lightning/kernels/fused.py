"""Activations as they are by plain codes on a GPU, a few rows at once: one kernel that reads a byte a weight."""

from __future__ import annotations

import functools
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from tinyq_lightning.kernels.base import BesideCodes, Choice, Kernel, LayerShape, WeightForm
from tinyq_lightning.kernels.tracing import outside_modes
from tinyq_lightning.methods import METHODS, Method

__all__ = [
    "FUSED",
    "FusedWeights",
    "has_fused_product",
]

# More rows take expanded weights and the GPU's library. Not measured: two blocks of the kernel's rows, since each block
# reads all codes.
_MOST_ROWS = 32


@functools.cache
def has_fused_product() -> bool:
    """Return True if Triton is installed, compiles the kernel for this machine's GPU, and the numbers are right."""
    try:
        with outside_modes():
            return torch.cuda.is_available() and _is_right("cuda")
    except Exception:  # whatever Triton, its compiler or the driver may raise, there is the formula
        return False


class FusedWeights(BesideCodes):
    """The codes as they are in the layer's buffer, for activations of any dtype."""

    bytes_a_weight = 0
    any_dtype = True

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        """As every form's, of the dtype of ``x``: float32, bfloat16 or float16."""
        from tinyq_lightning.kernels.triton_product import fused_product

        return fused_product(x, self._codes.contiguous(), scales, bias)


class _Fused(Kernel):
    name = "fused"
    devices = frozenset({"cuda"})
    forms: ClassVar[dict[str, type[WeightForm]]] = {"fused": FusedWeights}

    @override
    def lacks(self, layer: LayerShape) -> str:
        if layer.method.rounds:
            return "it takes activations as they are"
        return "" if has_fused_product() else "no kernel of Triton for this GPU"

    @override
    def variant(self, layer: LayerShape) -> str:
        return "fused"

    @override
    def fastest(self, layer: LayerShape, lacking: str) -> Choice | None:
        reason = "one byte a weight in memory, expanded on each call; for few rows within the product"
        return Choice("reference", reason, few_rows=_MOST_ROWS + 1, few="fused")


FUSED = _Fused()
"""Codes expanded within the product."""


def _is_right(device: str) -> bool:
    """Whether products of several sizes and dtypes are as exact as their dtype."""
    generator = torch.Generator("cpu").manual_seed(0)
    for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)):
        for rows, features, outputs in ((1, 130, 40), (19, 256, 64), (3, 7, 5)):
            codes = torch.randint(-127, 128, (outputs, features), generator=generator, dtype=torch.int8, device="cpu")
            x = torch.randn(rows, features, generator=generator, device="cpu", dtype=torch.float32).to(dtype)
            scales, bias = torch.rand(2, outputs, generator=generator, device="cpu", dtype=torch.float32)
            expected = (x.double() @ codes.double().t()) * scales.double() + bias.double()
            form = FusedWeights(codes.to(device), scales.to(device))
            out = form.product(METHODS["w8a32"], x.to(device), scales.to(device), bias.to(device)).double().cpu()
            if not (out - expected).norm() <= bound * expected.norm():
                return False
    return True
