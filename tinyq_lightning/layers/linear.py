"""Custom quantized layers: in the place of ``nn.Linear``, and of embeddings tied to one, with int8 weights."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from typing_extensions import Self

from tinyq_lightning.errors import ModelError
from tinyq_lightning.kernels import (
    FORMS,
    INPUT_DTYPES,
    Choice,
    Float32Weights,
    Implementation,
    Seen,
    choose_kernel,
    in_jit_trace,
    in_transform,
    input_gradient,
    is_exporting,
    number_layer,
    outside_modes,
    packed_layer,
    packed_linear,
    quantized_linear,
)
from tinyq_lightning.layers.int8_weight import Int8Weight, float_weight
from tinyq_lightning.methods import METHODS, KernelName

__all__ = [
    "LAYERS",
    "QuantizedLinear",
    "W8A8LinearLayer",
    "W8A16LinearLayer",
    "W8A32LinearLayer",
]


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
        self._choice: Choice | None = None
        self._number = number_layer(self)
        self._parts: dict[tuple[int | None, int | None], tuple[Seen, QuantizedLinear]] = {}
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
        layer = object.__new__(LAYERS[method])
        vars(layer).update(vars(self))
        layer._choice, layer._number, layer._parts = None, number_layer(layer), {}
        return layer

    @property
    def choice(self) -> Choice:
        """The kernel that the layer takes for inputs on the CPU, and why."""
        if self._choice is None:
            self._choice = choose_kernel(self.kernel, METHODS[self.method], self.out_features, self.in_features)
        return self._choice

    def forward(self, input: Tensor) -> Tensor:
        """``input`` ``[..., in]`` → ``[..., out]``, of the dtype that ``nn.Linear`` would give."""
        if not is_dynamo_compiling() and (weight := self._float_copy(input)) is not None:
            try:
                return nn.functional.linear(input, weight, self._parameters["bias"])
            except RuntimeError:
                pass  # an input of another shape, or a bias of another dtype: what comes below sees to that
        if input.is_nested:
            return self._forward_nested(input)
        if torch.compiler.is_compiling():
            return self._forward_traced(input)
        return self._linear(input, self._parameters["bias"])

    def forward_rows(self, input: Tensor, rows: slice) -> Tensor:
        """The part of the output that a slice of the weight's rows gives: ``[..., in]`` → ``[..., rows]``."""
        bias = None if self.bias is None else self.bias[rows]
        if torch.compiler.is_compiling():
            return self._formula(input, self._codes_in_graph()[rows], self.scales[rows], bias)
        return self._part(rows)._linear(input, bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """The gradient of the input ``[..., in]`` from that of the output ``[..., out]``, both float32."""
        return input_gradient(grad, self.int8_weights, self.scales)

    def _float_copy(self, input: Tensor) -> Tensor | None:
        """The float weight to multiply ``input`` with just as ``nn.Linear`` does; None where more is to be seen to."""
        if (
            (type(input) is Tensor and input.dtype is torch.float32 and input.is_cpu)
            and self._kernel_for(input) == "float32"
            and not (in_jit_trace() or torch.is_autocast_enabled("cpu"))
        ):
            form = cast("Float32Weights | None", self.form("float32"))
            return None if form is None else form.weight
        return None

    def _linear(self, input: Tensor, bias: Tensor | None) -> Tensor:
        if type(input) is Tensor and input.is_cpu and input.dtype in INPUT_DTYPES and not in_transform():
            kernel = self._kernel_for(input)
            if kernel in FORMS and input.dim() and input.shape[-1] == self.in_features:
                form = self.form(kernel)
                if form is not None:
                    scales: Tensor = self._buffers["scales"]  # type: ignore[assignment]
                    return packed_linear(METHODS[self.method], form, input, scales, bias)
        return self._formula(input, self.int8_weights, self.scales, bias)

    def _kernel_for(self, input: Tensor) -> Implementation:
        choice = self._choice or self.choice
        return choice.few if input.numel() < choice.few_rows * self.in_features else choice.kernel

    def _formula(self, input: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        kernel: Literal["exact", "reference"] = "exact" if self.kernel == "int8" else "reference"
        return quantized_linear(METHODS[self.method], kernel, input, codes, scales, bias)

    def _forward_traced(self, input: Tensor) -> Tensor:
        """One operator in a compiled graph; the formula in an exported one, which runs without this package."""
        wants_bias = self.bias is not None and self.bias.requires_grad and torch.is_grad_enabled()
        on_cpu = input.device.type == "cpu" and input.dtype in INPUT_DTYPES
        if is_exporting() or not on_cpu or wants_bias or not self._packs():
            return self._formula(input, self._codes_in_graph(), self.scales, self.bias)
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else input.dtype
        return packed_layer(input, self._number, self.out_features, dtype)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _packs(self) -> bool:
        return self.choice.kernel in FORMS or self.choice.few_rows > 0

    def _codes_in_graph(self) -> Tensor:
        codes = self._buffers["int8_weights"]
        return self._constant_codes() if codes is None else codes

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _constant_codes(self) -> Tensor:
        with outside_modes():
            codes = self.int8_weights
        self._buffers["int8_weights"] = None  # as it was: graphs are guarded by it
        return codes

    def _part(self, rows: slice) -> QuantizedLinear:
        """A layer of some of the rows."""
        codes, found = self.int8_weights, self._parts.get((rows.start, rows.stop))
        if found is None or not found[0].is_still(codes):
            layer = type(self)(self.in_features, len(codes[rows]), bias=False, dtype=self.dtype, device="meta")
            layer.kernel = self.kernel
            layer.int8_weights, layer.scales = codes[rows], self.scales[rows]
            found = self._parts[rows.start, rows.stop] = Seen(codes), layer
        return found[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_choice": None, "_parts": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._number = number_layer(self)

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
        if name == "kernel":
            self._choice = None
            self._parts = {}


class W8A32LinearLayer(QuantizedLinear):
    """``nn.Linear`` with int8 weights and 32-bit activations: the activations are used as they come."""

    method = "w8a32"


class W8A16LinearLayer(QuantizedLinear):
    """``nn.Linear`` with int8 weights and activations quantized to 16 bits, per token, as they come."""

    method = "w8a16"


class W8A8LinearLayer(QuantizedLinear):
    """``nn.Linear`` with int8 weights and activations quantized to int8, per token, as they come."""

    method = "w8a8"


LAYERS: dict[str, type[QuantizedLinear]] = {
    layer.method: layer for layer in (W8A32LinearLayer, W8A16LinearLayer, W8A8LinearLayer)
}
"""The layer of each method."""
