"""Custom quantized layers that take the place of ``nn.Linear``, with weights of eight or four bits."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.fx import Proxy
from typing_extensions import Self, override

from tinyq_lightning.kernels import (
    FORMS,
    INPUT_DTYPES,
    Choice,
    Float32Weights,
    FormulaName,
    TensorSnapshot,
    choose_kernel,
    count_modes,
    holds_packed_constants,
    in_jit_trace,
    in_transform,
    is_exporting_for_any_processor,
    packed_linear,
    quantized_linear,
    takes_integers,
    wanted_kernel,
)
from tinyq_lightning.layers.computed import float_weight
from tinyq_lightning.layers.int8_weight import Int8Weight
from tinyq_lightning.layers.leaf import leaf_call
from tinyq_lightning.layers.multiplying import MultiplyingLayer
from tinyq_lightning.methods import METHODS, KernelName

__all__ = [
    "LAYERS",
    "QuantizedLinear",
    "W4A8LinearLayer",
    "W4A16LinearLayer",
    "W4A32LinearLayer",
    "W8A8LinearLayer",
    "W8A16LinearLayer",
    "W8A32LinearLayer",
]


class QuantizedLinear(MultiplyingLayer, nn.Linear):  # type: ignore[override]
    """A linear layer that holds its weight as int8 codes with one float32 scale per output row.

    The base of the layers below, which differ in their activations and in the bits of their codes only. It holds
    ``int8_weights`` ``[out, in]`` int8 and ``scales`` ``[out]`` float32 as buffers, and ``bias``
    ``[out]`` as a parameter if there is one; with four bits also ``multipliers``.

    It is a subclass of ``nn.Linear``, because other people's code asks ``isinstance(layer, nn.Linear)`` to decide what
    to do with a layer (scvi-tools concatenates covariates before each of them, PEFT puts adapters on them), and a
    layer that is not one takes another path without an error. An honest subclass, as bitsandbytes and quanto have it,
    also holds for ``issubclass``, ``singledispatch`` and type checkers, where a forged ``__class__`` would not.
    ``weight`` is a read-only property, not a parameter: code that initializes or trains it fails with an error that
    says so. Code that tells quantized layers from float ones must ask for this class before it asks for ``nn.Linear``.

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample.
        bias: whether the layer has a bias.
        dtype: floating dtype of the bias and of the dequantized weight.
        device: where the layer lives.
    """

    method: str
    bias: nn.Parameter | None  # type: ignore[assignment]

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
        self._choices = {}
        self._parts: dict[tuple[int | None, int | None], tuple[TensorSnapshot, TensorSnapshot, QuantizedLinear]] = {}
        if METHODS[self.method].bits == 4:
            self._hold_four_bits()
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros, requires_grad=False))
        self._keep_a_parameter()

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
        """A layer that holds its activations by another method and shares this layer's tensors and hooks."""
        self._refuse_other_bits(method)
        layer = object.__new__(LAYERS[method])
        vars(layer).update(vars(self))
        layer._choices, layer._parts = {}, {}
        return layer

    @override
    def _choose(self, device: str) -> Choice:
        return choose_kernel(self.kernel, METHODS[self.method], self.out_features, self.in_features, device)

    def forward(self, input: Tensor) -> Tensor:
        """``input`` ``[..., in]`` → ``[..., out]``, of the dtype that ``nn.Linear`` would give."""
        if type(input) is Tensor and not is_dynamo_compiling():
            out = self._by_form(input, self._parameters["bias"])
            if out is not None:
                return out
        if isinstance(input, Proxy):
            return leaf_call(self, input)
        if input.is_nested:
            return self._forward_nested(input)
        if torch.compiler.is_compiling():
            return self._in_graph(input, self.int8_weights, self.scales, self.bias)
        return self._formula(input, self._parameters["bias"])

    def forward_rows(self, input: Tensor, rows: slice) -> Tensor:
        """The part of the output that a slice of the weight's rows gives: ``[..., in]`` → ``[..., rows]``."""
        bias = None if self.bias is None else self.bias[rows]
        if torch.compiler.is_compiling():
            codes = self.int8_weights[rows]
            if holds_packed_constants():
                codes = codes.neg().neg()  # a package would hold all of a slice's memory; the compiler removes copies
            return self._in_graph(input, codes, self.scales[rows], bias)
        return self._part(rows)._linear(input, bias)

    def _by_form(self, input: Tensor, bias: Tensor | None) -> Tensor | None:
        """The output by a kernel that has a form of the weights; None if none takes this input here."""
        # Written for speed: a small layer's product takes less time than a few of these questions.
        if in_jit_trace() or input.is_nested or not input.dim() or input.shape[-1] != self.in_features:
            return None
        kernel = self._kernel_for(input)
        if kernel == "float32" and input.dtype is torch.float32 and not torch.is_autocast_enabled("cpu"):
            copied = cast("Float32Weights | None", self.form(kernel))
            if copied is not None and (bias is None or bias.dtype is torch.float32):
                return nn.functional.linear(input, copied.weight, bias)  # just as nn.Linear does
        if kernel not in FORMS or input.dtype not in INPUT_DTYPES or in_transform():
            return None
        form = self.form(kernel)
        if form is None:
            return None
        scales: Tensor = self._buffers["scales"]  # type: ignore[assignment]
        return packed_linear(METHODS[self.method], form, input, scales, bias)

    def _linear(self, input: Tensor, bias: Tensor | None) -> Tensor:
        out = self._by_form(input, bias) if type(input) is Tensor else None
        return self._formula(input, bias) if out is None else out

    def _formula(self, input: Tensor, bias: Tensor | None) -> Tensor:
        with warnings.catch_warnings():
            if in_jit_trace():  # which warns of each comparison of shapes
                warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined, unused-ignore]
            method, kernel = METHODS[self.method], self._formula_for(input)
            return quantized_linear(method, kernel, input, self.int8_weights, self.scales, bias)

    def _kernel_for(self, input: Tensor) -> str:
        choice = self._choices.get("cpu") if input.is_cpu else None
        choice = choice or self._choice_on(input.device.type)
        return choice.few if input.numel() < choice.few_rows * self.in_features else choice.kernel

    def _in_graph(self, input: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        """A formula of torch's operators on plain codes, which compilers can fuse and exported programs can hold."""
        method = METHODS[self.method]
        if self._is_transformed():
            return quantized_linear(method, self._formula_name(), input, codes, scales, bias, differentiable=True)
        integers = input.dtype in INPUT_DTYPES and self._takes_integers(input.device.type)
        kernel: FormulaName = "integer" if integers else self._formula_name()
        return quantized_linear(method, kernel, input, codes, scales, bias)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _takes_integers(self, device: str) -> bool:  # run once, while a graph is traced
        if not takes_integers(self.in_features, device):
            return False
        asked, kernel = wanted_kernel(self.kernel), self._choice_on(device).kernel
        # A float copy that a layer keeps for speed, though integers are exact here, is for calls outside of graphs.
        integers = kernel.startswith("int8") or (asked == "auto" and kernel == "float32")
        # An exported program may run on a processor whose product saturates, so it takes the product if asked for.
        return integers and (asked == "int8" or not is_exporting_for_any_processor())

    def _part(self, rows: slice) -> QuantizedLinear:
        """A layer of some of the rows."""
        codes, found = self.int8_weights, self._parts.get((rows.start, rows.stop))
        if found is None or not (found[0].matches(codes) and found[1].matches(self.scales)):
            layer = type(self)(self.in_features, len(codes[rows]), bias=False, dtype=self.dtype, device="meta")
            layer.kernel = self.kernel
            multipliers = self.multipliers[rows] if self.bits == 4 else None
            layer.take_codes(codes[rows], self.scales[rows], multipliers)
            if layer.choice.kernel.startswith("int8") and takes_integers(self.in_features):
                # The whole layer holds plain codes for its parts: packed ones would lie beside them.
                layer._choices["cpu"] = replace(layer.choice, kernel="int8")
            if count_modes():  # its slices may be those of a tracer, such as fake tensors
                return layer
            found = self._parts[rows.start, rows.stop] = TensorSnapshot(codes), TensorSnapshot(self.scales), layer
        return found[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_parts": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        former = ("_choice", "_number")  # of pickles that earlier versions wrote
        kept = {name: value for name, value in state.items() if name not in former}
        super().__setstate__({**kept, "_choices": {}, "_parts": {}})

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
        super().__setattr__(name, value)
        if name == "kernel":
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


class W4A32LinearLayer(QuantizedLinear):
    """``nn.Linear`` with weights of four bits and 32-bit activations: the activations are used as they come."""

    method = "w4a32"


class W4A16LinearLayer(QuantizedLinear):
    """``nn.Linear`` with weights of four bits and activations quantized to 16 bits, per token, as they come."""

    method = "w4a16"


class W4A8LinearLayer(QuantizedLinear):
    """``nn.Linear`` with weights of four bits and activations quantized to int8, per token, as they come."""

    method = "w4a8"


LAYERS: dict[str, type[QuantizedLinear]] = {
    layer.method: layer
    for layer in (
        W8A32LinearLayer,
        W8A16LinearLayer,
        W8A8LinearLayer,
        W4A32LinearLayer,
        W4A16LinearLayer,
        W4A8LinearLayer,
    )
}
"""The layer of each method."""
