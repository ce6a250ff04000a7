"""Quantized layers in the forms that ONNX has for them, while torch exports the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from tinyq_lightning.handover.onnx_operators import (
    dequantize_linear,
    dequantized_product,
    round_samples,
    rounded_product,
)
from tinyq_lightning.handover.onnx_recurrent import CellForm, RecurrentForm, SequenceForm
from tinyq_lightning.kernels import LONGEST_SUM, Geometry, convolve, is_exporting
from tinyq_lightning.layers import (
    Int8Matrix,
    Int8Weight,
    QuantizedConv,
    QuantizedEmbedding,
    QuantizedEmbeddingBag,
    QuantizedLayer,
    QuantizedLinear,
    QuantizedRecurrent,
)
from tinyq_lightning.methods import METHODS

__all__ = [
    "onnx_forms",
]


class _WeightForm(Int8Weight):
    """A layer whose weight, where the model reads it, is a DequantizeLinear of its codes.

    Attributes:
        rounds: whether activations are rounded as the layer's method says; if not, that is left to the runtime.
    """

    rounds: bool

    @property
    def weight(self) -> Tensor:
        """The dequantized weight in the layer's dtype."""
        if not is_exporting() or self.dtype == torch.float64:
            return super().weight
        codes, scales, groups = self.int8_weights, self.scales, self._transposed_groups
        if groups > 0:
            rows, outputs = len(codes) // groups, len(scales) // groups
            starts = [(rows * group, outputs * group) for group in range(groups)]
            parts = [(codes[row : row + rows], scales[out : out + outputs]) for row, out in starts]
            weight = torch.cat([dequantize_linear(*part, axis=1) for part in parts])
        elif len(codes) == len(scales):
            weight = dequantize_linear(codes, scales, axis=0)
        else:
            weight = dequantize_linear(codes.reshape(len(scales), -1), scales, axis=0).reshape(codes.shape)
        return weight.to(self.dtype)


class _LinearForm(_WeightForm, QuantizedLinear):  # type: ignore[override]
    """MatMul and Add of a DequantizeLinear, or MatMulInteger of digits; never Gemm, whose int8 is slower than float."""

    def _in_graph(self, input: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        if not is_exporting() or input.dtype == torch.float64 or not self.in_features:
            return super()._in_graph(input, codes, scales, bias)
        if input.dim() == 1:
            return self._in_graph(input[None], codes, scales, bias)[0]
        x, columns, method = input.float(), codes.t(), METHODS[self.method]
        if self.rounds and method.rounds and self.in_features <= LONGEST_SUM:
            return rounded_product(x, columns, scales, bias, method).to(input.dtype)
        return dequantized_product(x, columns, scales, bias).to(input.dtype)


class _ConvForm(_WeightForm, QuantizedConv):
    """A convolution by a DequantizeLinear, of activations that are rounded before it."""

    def _in_graph(self, x: Tensor, geometry: Geometry) -> Tensor:
        if not is_exporting() or x.dtype == torch.float64:
            return super()._in_graph(x, geometry)
        method, work = METHODS[self.method], x.float()
        if self.rounds and method.rounds:
            work = round_samples(work, method)
        bias = None if self.bias is None else self.bias.float()
        return convolve(work, self.weight.float(), bias, geometry).to(x.dtype)


class _EmbeddingForm(_WeightForm, QuantizedEmbedding):  # type: ignore[override]
    """A Gather of codes and one of scales, as the layer has it; its weight may be read as well."""


class _EmbeddingBagForm(_WeightForm, QuantizedEmbeddingBag):  # type: ignore[override]
    """As an embedding; bags of one length are reduced over a dimension, others scattered: any number of bags."""

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """As ``nn.EmbeddingBag.forward``."""
        if not is_exporting() or (offsets is None and not input.shape[-1]):
            return super().forward(input, offsets, per_sample_weights)
        rows = self._rows(input)
        if per_sample_weights is not None:
            rows = rows * per_sample_weights.unsqueeze(-1)
        left_out = None
        if self.padding_idx is not None:
            left_out = (input == self.padding_idx % self.num_embeddings).unsqueeze(-1)
        if offsets is not None:
            return self._scattered(rows, offsets, left_out)
        if left_out is None:
            return self._reduced_rows(rows)
        if self.mode == "max":
            most = rows.masked_fill(left_out, -torch.inf).amax(1)
            return most.masked_fill(left_out.all(1), 0.0)
        total = rows.masked_fill(left_out, 0.0).sum(1)
        return total if self.mode == "sum" else total / (~left_out).sum(1).clamp_min(1)

    def _scattered(self, rows: Tensor, offsets: Tensor, left_out: Tensor | None) -> Tensor:
        """``[n, dim]`` reduced to ``[bags, dim]``, each bag from its offset to the next one.

        torch's own translation is a loop over the bags, which OpenVINO does not read.
        """
        places = torch.arange(rows.shape[0])
        bags = (offsets.long()[None] <= places[:, None]).sum(1, keepdim=True) - 1
        counts = torch.ones_like(rows) if left_out is None else (~left_out).to(rows.dtype).expand(rows.shape)
        if self.mode == "max":
            kept = rows if left_out is None else rows.masked_fill(left_out, -torch.inf)
            lowest = torch.full((offsets.shape[0], rows.shape[1]), -torch.inf, dtype=rows.dtype)
            most = lowest.scatter_reduce(0, bags.expand(rows.shape), kept, "amax")
            reduced = torch.where(most == -torch.inf, 0.0, most)
        else:
            zeros = torch.zeros(offsets.shape[0], rows.shape[1], dtype=rows.dtype)
            reduced = zeros.scatter_add(0, bags.expand(rows.shape), rows * counts)
            if self.mode == "mean":
                reduced = reduced / zeros.scatter_add(0, bags.expand(rows.shape), counts).clamp_min(1)
        return reduced[:-1] if self.include_last_offset else reduced


class _MatrixForm(_WeightForm, Int8Matrix):
    """A matrix that the model reads."""


# The form of each kind of layer. A layer that has none keeps its formula of torch's operators, on its own codes.
_FORMS: tuple[tuple[type[QuantizedLayer], type[QuantizedLayer]], ...] = (
    (QuantizedLinear, _LinearForm),
    (QuantizedConv, _ConvForm),
    (QuantizedEmbedding, _EmbeddingForm),
    (QuantizedEmbeddingBag, _EmbeddingBagForm),
    (Int8Matrix, _MatrixForm),
    (QuantizedRecurrent, SequenceForm),
)


@contextmanager
def onnx_forms(model: nn.Module, rounds: bool) -> Iterator[None]:
    """Context manager in which the quantized layers of a model are exported in their ONNX forms.

    Layers keep their identity, tensors and hooks, and compute what they did wherever nothing is exported.

    Args:
        model: the model.
        rounds: whether activations are rounded in standard operators, as each layer's method says.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    classes = [type(layer) for layer in layers]
    try:
        for layer, own in zip(layers, classes, strict=True):
            if isinstance(layer, Int8Weight):
                layer.unpack()  # codes that are not buffers would have no name
            layer.__class__ = _form_of(own, rounds)  # type: ignore[arg-type]
        yield
    finally:
        for layer, own in zip(layers, classes, strict=True):
            layer.__class__ = own


@cache
def _form_of(own: type[QuantizedLayer], rounds: bool) -> type[QuantizedLayer]:
    form = next((form for kind, form in _FORMS if issubclass(own, kind)), None)
    if form is None:
        return own
    if form is SequenceForm and issubclass(own, nn.RNNCellBase):
        form = CellForm
    if issubclass(own, QuantizedRecurrent) and own.forward_is_own:
        form = RecurrentForm  # its forward is traced as it is
    content: dict[str, Any] = {"rounds": rounds, "__module__": own.__module__, "__qualname__": own.__qualname__}
    return cast("type[QuantizedLayer]", type(own.__name__, (form, own), content))
