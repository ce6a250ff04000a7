"""Custom quantized layers: drop-in replacements for ``nn.Linear`` with int8 weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from typing_extensions import Self

from tinyq_lightning.errors import ModelError, ReadOnlyWeightError
from tinyq_lightning.forward import METHODS, KernelName, quantized_linear
from tinyq_lightning.weight_math import dequantize, quantize_per_row

__all__ = ["LAYERS", "QuantizedLinear", "W8A8LinearLayer", "W8A16LinearLayer", "W8A32LinearLayer"]


class QuantizedLinear(nn.Module):
    """A linear layer that holds its weight as int8 codes with one float32 scale per output row.

    The base of the layers below, which differ in their activations only. It holds
    ``int8_weights`` ``[out, in]`` int8 and ``scales`` ``[out]`` float32 as buffers, and ``bias``
    ``[out]`` as a parameter where there is one. Codes and scales keep their dtypes under ``.half()``,
    ``.to(torch.bfloat16)`` and every Lightning precision; ``dtype`` follows, and with it the bias and
    the dequantized :attr:`weight`.

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample.
        bias: whether the layer has a bias.
        dtype: floating dtype of the bias and of the dequantized weight.
        device: where the layer lives.
    """

    method: ClassVar[str]
    int8_weights: Tensor
    scales: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.kernel: KernelName = "auto"
        codes = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.register_buffer("int8_weights", codes)
        self.register_buffer("scales", torch.ones(out_features, dtype=torch.float32, device=device))
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros, requires_grad=False))

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """A quantized layer with the weight of ``linear``. The bias is carried over as it is, not copied.

        Raises:
            ModelError: the weight is not finite, not materialized, or on the meta device.
        """
        weight = linear.weight
        layer = cls(linear.in_features, linear.out_features, bias=False, dtype=weight.dtype, device="meta")
        layer.quantize(weight)
        layer.bias = linear.bias
        return layer.train(linear.training)

    def quantize(self, weight: Tensor) -> Self:
        """Take ``weight`` ``[out, in]``, any floating dtype, as this layer's weight, quantized to int8.

        The codes are made on the weight's device. Returns the layer.

        Raises:
            ModelError: the shape is another, or the weight cannot be quantized.
        """
        if tuple(weight.shape) != (self.out_features, self.in_features):
            wanted = [self.out_features, self.in_features]
            raise ModelError(f"{type(self).__name__} takes a weight of shape {wanted}, got {list(weight.shape)}")
        with torch.inference_mode(False), torch.no_grad():  # buffers that can be trained past later
            self.int8_weights, self.scales = quantize_per_row(weight)
        return self

    def with_method(self, method: str) -> QuantizedLinear:
        """This layer with its activations held by another method: the same tensors and hooks, not copies."""
        layer = copy.copy(self)
        layer.__class__ = LAYERS[method]
        return layer

    def dequantize(self) -> Tensor:
        """The weight as floats: ``[out, in]`` float32 (float64 where the layer's dtype is that)."""
        work = torch.float64 if self.dtype == torch.float64 else torch.float32
        return dequantize(self.int8_weights, self.scales, work)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight ``[out, in]`` in the layer's dtype, made anew on each read; read only."""
        return dequantize(self.int8_weights, self.scales, self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """``input`` ``[..., in]`` → ``[..., out]``, of the dtype that ``nn.Linear`` would give."""
        method = METHODS[self.method]
        return quantized_linear(method, self.kernel, input, self.int8_weights, self.scales, self.bias)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows in the brackets."""
        kernel = "" if self.kernel == "auto" else f", kernel={self.kernel}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, dtype={self.dtype}{kernel}"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            _refuse_weight(type(self).__name__)
        if name == "bias" and isinstance(value, Tensor):
            if tuple(value.shape) != (self.out_features,):
                raise ModelError(f"a bias must have shape [{self.out_features}], got {list(value.shape)}")
            if not isinstance(value, nn.Parameter):
                value = nn.Parameter(value.detach(), requires_grad=False)
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Casts are for the bias and the dequantized view. Codes and scales move, but keep dtype and bits:
        # a bfloat16 scale alone costs 0.2 % of accuracy, and lets 128 wrap round to -128.
        kept = {name: self._buffers[name] for name in ("int8_weights", "scales")}
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scales.device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


def _refuse_weight(layer: str) -> NoReturn:
    raise ReadOnlyWeightError(
        f"the weight of {layer} is a read-only view of its int8 codes: call .quantize(weight) to replace it, "
        "or assign before quantizing"
    )


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
