"""Custom quantized layers: in the place of ``nn.Linear``, and of embeddings tied to one, with int8 weights."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, MutableMapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.weak import WeakTensorKeyDictionary
from typing_extensions import Self

from tinyq_lightning.errors import ModelError, ReadOnlyWeightError
from tinyq_lightning.forward import METHODS, KernelName, quantized_linear
from tinyq_lightning.weight_math import dequantize, quantize_per_row

__all__ = [
    "LAYERS",
    "Int8Weight",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "W8A8LinearLayer",
    "W8A16LinearLayer",
    "W8A32LinearLayer",
    "float_weight",
]

# Where codes that several layers share were moved to by the first of them, so that the others follow it.
_moved: MutableMapping[Tensor, weakref.ref[Tensor]] = WeakTensorKeyDictionary()


class Int8Weight(nn.Module):
    """A matrix held as int8 codes with one float32 scale per row; what quantized layers have in common.

    The buffers ``int8_weights`` ``[rows, columns]`` int8 and ``scales`` ``[rows]`` float32 keep their
    dtypes under ``.half()``, ``.to(torch.bfloat16)`` and every Lightning precision; :attr:`dtype`
    follows, and with it the dequantized :attr:`weight`. Layers that share them still do after ``.to``,
    ``deepcopy`` and pickling.
    """

    int8_weights: Tensor
    scales: Tensor
    dtype: torch.dtype

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str | None) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("int8_weights", torch.zeros(rows, columns, dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.ones(rows, dtype=torch.float32, device=device))

    def quantize(self, weight: Tensor) -> Self:
        """Take ``weight`` ``[rows, columns]``, any floating dtype, as this layer's weight, quantized to int8.

        The codes are made on the weight's device. Returns the layer.

        Raises:
            ModelError: the shape is another, or the weight cannot be quantized.
        """
        if weight.shape != self.int8_weights.shape:
            wanted = list(self.int8_weights.shape)
            raise ModelError(f"{type(self).__name__} takes a weight of shape {wanted}, got {list(weight.shape)}")
        with torch.inference_mode(False), torch.no_grad():  # buffers that can be trained past later
            self.int8_weights, self.scales = quantize_per_row(weight)
        return self

    def share(self, other: Int8Weight) -> Self:
        """Take the codes and scales of ``other``: the same memory, not a copy. Returns the layer."""
        self.int8_weights, self.scales = other.int8_weights, other.scales
        return self

    def dequantize(self) -> Tensor:
        """The weight as floats: ``[rows, columns]`` float32 (float64 where the layer's dtype is that)."""
        work = torch.float64 if self.dtype == torch.float64 else torch.float32
        return dequantize(self.int8_weights, self.scales, work)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight in the layer's dtype, made anew on each read; read only."""
        return dequantize(self.int8_weights, self.scales, self.dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise ReadOnlyWeightError(
                f"the weight of {type(self).__name__} is a read-only view of its int8 codes: call .quantize(weight) to "
                "replace it, or assign before quantizing"
            )
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Casts are for the bias and the dequantized view. Codes and scales move, but keep dtype and bits:
        # a bfloat16 scale alone costs 0.2 % of accuracy, and lets 128 wrap round to -128.
        kept = {name: getattr(self, name) for name in ("int8_weights", "scales")}
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scales.device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and after is not before:
                self._buffers[name] = _follow(before, after)
        return self


def _follow(before: Tensor, after: Tensor) -> Tensor:
    """``after``, of the dtype that ``before`` had; or what another layer has made of ``before`` there."""
    if after.dtype != before.dtype:
        after = before.to(after.device)
    if after is before:
        return after
    first = _moved[before]() if before in _moved else None
    if first is not None and first.device == after.device:
        return first
    _moved[before] = weakref.ref(after)
    return after


def float_weight(module: nn.Module) -> Tensor:
    """The weight that a float layer works with; a parametrized one as it is in eval mode, which leaves no trace."""
    if not parametrize.is_parametrized(module, "weight"):
        return module.weight  # type: ignore[return-value]
    below = list(module.parametrizations.modules())  # type: ignore[union-attr]
    modes = [each.training for each in below]
    try:
        for each in below:
            each.training = False  # spectral_norm goes on with its power iteration in training mode
        with torch.no_grad():
            return module.weight  # type: ignore[return-value]
    finally:
        for each, mode in zip(below, modes, strict=True):
            each.training = mode


class QuantizedLinear(Int8Weight):
    """A linear layer that holds its weight as int8 codes with one float32 scale per output row.

    The base of the layers below, which differ in their activations only. It holds
    ``int8_weights`` ``[out, in]`` int8 and ``scales`` ``[out]`` float32 as buffers, and ``bias``
    ``[out]`` as a parameter where there is one.

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample.
        bias: whether the layer has a bias.
        dtype: floating dtype of the bias and of the dequantized weight.
        device: where the layer lives.
    """

    method: ClassVar[str]
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(out_features, in_features, dtype, device)
        self.in_features = in_features
        self.out_features = out_features
        self.kernel: KernelName = "auto"
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros, requires_grad=False))

    @classmethod
    def from_linear(cls, linear: nn.Linear, shares: Int8Weight | None = None) -> Self:
        """A quantized layer with the weight of ``linear``. The bias is carried over as it is, not copied.

        Args:
            linear: the float layer.
            shares: a layer that has quantized the same weight already; its codes are taken then.

        Raises:
            ModelError: the weight is not finite, not materialized, or on the meta device.
        """
        weight = float_weight(linear)
        layer = cls(linear.in_features, linear.out_features, bias=False, dtype=weight.dtype, device="meta")
        if shares is None:
            layer.quantize(weight)
        else:
            layer.share(shares)
        layer.bias = linear.bias
        return layer.train(linear.training)

    def with_method(self, method: str) -> QuantizedLinear:
        """This layer with its activations held by another method: the same tensors and hooks, not copies."""
        layer = copy.copy(self)
        layer.__class__ = LAYERS[method]
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """``input`` ``[..., in]`` → ``[..., out]``, of the dtype that ``nn.Linear`` would give."""
        if input.is_nested:
            return self._forward_nested(input)
        method = METHODS[self.method]
        return quantized_linear(method, self.kernel, input, self.int8_weights, self.scales, self.bias)

    def forward_rows(self, input: Tensor, rows: slice) -> Tensor:
        """The part of the output that a slice of the weight's rows gives: ``[..., in]`` → ``[..., rows]``."""
        bias = None if self.bias is None else self.bias[rows]
        method = METHODS[self.method]
        return quantized_linear(method, self.kernel, input, self.int8_weights[rows], self.scales[rows], bias)

    def _forward_nested(self, input: Tensor) -> Tensor:
        """One product over the tokens of all sequences."""
        if input.layout == torch.jagged:
            return torch.nested.nested_tensor_from_jagged(
                self(input.values()),
                input.offsets(),  # type: ignore[attr-defined]
                input.lengths(),  # type: ignore[attr-defined]
            )
        parts = input.unbind()
        out = self(torch.cat(parts)).split([len(part) for part in parts])
        return torch.nested.as_nested_tensor(list(out), layout=input.layout)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows in the brackets."""
        kernel = "" if self.kernel == "auto" else f", kernel={self.kernel}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, dtype={self.dtype}{kernel}"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "bias" and isinstance(value, Tensor):
            if tuple(value.shape) != (self.out_features,):
                raise ModelError(f"a bias must have shape [{self.out_features}], got {list(value.shape)}")
            if not isinstance(value, nn.Parameter):
                value = nn.Parameter(value.detach(), requires_grad=False)
        super().__setattr__(name, value)


class W8A32LinearLayer(QuantizedLinear):
    """``nn.Linear`` with int8 weights and 32-bit activations: the activations are used as they come."""

    method = "w8a32"


class W8A16LinearLayer(QuantizedLinear):
    """``nn.Linear`` with int8 weights and activations held in 16 bits, per token."""

    method = "w8a16"


class W8A8LinearLayer(QuantizedLinear):
    """``nn.Linear`` with int8 weights and activations quantized to int8, per token, as they come."""

    method = "w8a8"


LAYERS: dict[str, type[QuantizedLinear]] = {
    layer.method: layer for layer in (W8A32LinearLayer, W8A16LinearLayer, W8A8LinearLayer)
}
"""The layer of each method."""


class QuantizedEmbedding(Int8Weight):
    """Look-ups in the int8 weight of a linear layer that an ``nn.Embedding`` is tied to.

    The buffers are those of the linear layer: ``int8_weights`` ``[num, dim]`` int8, ``scales`` ``[num]``
    float32. A row comes out as its codes times its scale.

    Args:
        num_embeddings: rows.
        embedding_dim: size of each row.
        padding_idx: kept for those who read it; it decides gradients only, and int8 weights have none.
        dtype: floating dtype of what is looked up.
        device: where the layer lives.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, device)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, shares: Int8Weight | None = None) -> Self:
        """A quantized layer with the weight of ``embedding``, or the codes of a layer that has quantized it already.

        Raises:
            ModelError: the weight is not finite, or on the meta device.
        """
        rows, columns = embedding.weight.shape
        layer = cls(rows, columns, embedding.padding_idx, embedding.weight.dtype, "meta")
        layer = layer.quantize(embedding.weight) if shares is None else layer.share(shares)
        return layer.train(embedding.training)

    def forward(self, input: Tensor) -> Tensor:
        """``input`` ``[...]`` of integers → ``[..., dim]`` of the layer's dtype."""
        work = torch.float64 if self.dtype == torch.float64 else torch.float32
        codes = nn.functional.embedding(input, self.int8_weights)
        scales = nn.functional.embedding(input, self.scales[:, None])
        return torch.mul(codes.to(work), scales).to(self.dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows in the brackets."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, dtype={self.dtype}"
