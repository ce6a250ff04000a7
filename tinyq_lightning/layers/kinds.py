"""The one table of layer kinds: what a kind is found by, why one of them stays float, how it is made and restored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from tinyq_lightning.kernels import Choice, choose_kernel
from tinyq_lightning.layers.attention import QuantizedMultiheadAttention, in_projections, linear_with
from tinyq_lightning.layers.behaviour import (
    computes_linear,
    forward_takes_one_input,
    multiplies_matrices,
)
from tinyq_lightning.layers.computed import float_weight
from tinyq_lightning.layers.conv_kind import ConvKind
from tinyq_lightning.layers.embedding_kind import EmbeddingBagKind, EmbeddingKind
from tinyq_lightning.layers.int8_weight import Int8Weight
from tinyq_lightning.layers.kind import Candidate, Kind, WeightSize, first_tensor
from tinyq_lightning.layers.linear import LAYERS, QuantizedLinear
from tinyq_lightning.layers.matrix import MatrixKind
from tinyq_lightning.layers.quantized_layer import QuantizedLayer
from tinyq_lightning.layers.recurrent_kind import RecurrentKind
from tinyq_lightning.layers.why_float import (
    why_holds_more,
    why_more_than,
    why_more_than_forward,
    why_own_way,
    why_replaced,
    why_weight,
)
from tinyq_lightning.methods import METHODS, KernelName

__all__ = [
    "KINDS",
    "has_inner_layers",
    "is_replaceable",
    "kind_of",
    "methods_of",
    "why_closed",
]


class LinearKind(Kind):
    """``nn.Linear``, and subclasses of it that do what it does."""

    name = "linear"
    why_uncalibrated = None
    quantized_class = QuantizedLinear

    def finds(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and not isinstance(module, Int8Weight)

    def candidates(self, module: nn.Module, closed: str | None) -> Iterator[Candidate]:
        why = closed or why_more_than(module, nn.Linear) or why_weight(module) or why_holds_more(module)
        yield Candidate(self, module, {"weight": (module, "weight")}, why)

    def sizes(self, layer: Any) -> Mapping[str, WeightSize]:
        return {"weight": WeightSize((layer.out_features, layer.in_features), layer.out_features)}

    def choice(self, layer: Any, method: str, kernel: KernelName) -> Choice | None:
        return choose_kernel(kernel, METHODS[method], layer.out_features, layer.in_features)

    def make(self, layer: Any, codes: Mapping[str, Int8Weight], method: str, kernel: KernelName) -> QuantizedLinear:
        quantized = LAYERS[method].from_linear(layer, codes["weight"])
        quantized.kernel = kernel
        return quantized

    def make_empty(self, layer: Any, method: str, kernel: KernelName) -> QuantizedLinear:
        weight = float_weight(layer)
        rows, columns = weight.shape
        quantized = LAYERS[method](columns, rows, layer.bias is not None, weight.dtype, weight.device)
        quantized.kernel = kernel
        return quantized

    def size_of_call(self, layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
        x = first_tensor(args, kwargs)  # for a nested tensor the layer calls itself with the tokens
        return (0 if x.is_nested else x.shape[:-1].numel()), ()

    def example(
        self, layer: Any, amount: int, sizes: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
    ) -> tuple[Any, ...]:
        return (torch.randn(amount, layer.in_features, generator=generator).to(dtype),)

    def plain(self, layer: nn.Module) -> nn.Module:
        return linear_with(float_weight(layer).detach(), cast("nn.Parameter | None", layer.bias))


class LikeLinearKind(LinearKind):
    """A class that is no ``nn.Linear`` and computes what it does, such as Hugging Face's ``Conv1D``.

    Known by what its forward computes. Its weight may be ``[in, out]``.
    """

    def finds(self, module: nn.Module) -> bool:
        # A class of torch's own has a meaning of its own.
        return (
            type(module).__module__.partition(".")[0] != "torch"
            and not isinstance(module, nn.Linear | nn.Embedding | nn.EmbeddingBag | QuantizedLayer)
            and multiplies_matrices(module)
            and forward_takes_one_input(module)
            and (computes_linear(module) or computes_linear(module, transposed=True))
        )

    def candidates(self, module: nn.Module, closed: str | None) -> Iterator[Candidate]:
        weight, bias = cast(Tensor, module._parameters["weight"]), module._parameters.get("bias")
        turned = not computes_linear(module)
        held = nn.Parameter(weight.detach().t() if turned else weight.detach(), requires_grad=weight.requires_grad)
        layer = linear_with(held if turned else weight, bias).train(module.training)
        why = closed or why_replaced(module) or why_more_than_forward(module) or why_weight(module)
        why = why or why_holds_more(module)
        yield Candidate(self, layer, {"weight": (module, "weight")}, why)

    def restore(self, layer: nn.Module, original: nn.Module, quantized: QuantizedLayer) -> bool:
        if layer.weight is original._parameters["weight"]:
            return super().restore(layer, original, quantized)
        original.to(quantized.device, quantized.dtype)  # would leave the transposed view behind
        with torch.no_grad():
            cast(Tensor, original.weight).data.copy_(quantized.coded_weights()["weight"].dequantize().t())
            if (bias := original._parameters["bias"]) is not None:
                bias.data.copy_(cast(Tensor, quantized.bias))
        return True


class AttentionKind(LinearKind):
    """``nn.MultiheadAttention``, whose projections are bare matrices: each becomes a layer."""

    name = "attention"

    def finds(self, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention) and not is_opened(module)

    def candidates(self, module: nn.Module, closed: str | None) -> Iterator[Candidate]:
        attention = cast(nn.MultiheadAttention, module)
        closed = closed or why_closed(module)
        opened = None if closed else QuantizedMultiheadAttention(attention)
        parts = dict(in_projections(attention)) if opened is None else opened._modules
        for part, layer in parts.items():
            assert layer is not None
            parameter = (layer, "weight") if part == "out_proj" else (module, f"{part}_weight")
            why = closed or why_more_than(layer, nn.Linear) or why_weight(layer) or why_holds_more(layer)
            yield Candidate(self, layer, {"weight": parameter}, why, part, opened)


KINDS: tuple[Kind, ...] = (
    LinearKind(),
    AttentionKind(),
    ConvKind(),
    EmbeddingKind(),
    EmbeddingBagKind(),
    RecurrentKind(),
    LikeLinearKind(),
    MatrixKind(),
)
"""Every kind; the first that finds a module takes it."""


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a float or a quantized layer; None for any other module."""
    if isinstance(module, QuantizedLayer):
        return next((kind for kind in KINDS if kind.is_quantized(module)), None)
    return next((kind for kind in KINDS if kind.finds(module)), None)


def methods_of(layer: QuantizedLayer) -> tuple[str, ...]:
    """The methods that a quantized layer can be given."""
    kind = kind_of(layer)
    return (layer.method,) if kind is None else kind.methods_of(layer)


def is_replaceable(module: object) -> bool:
    """Whether ``module`` would itself be replaced, which takes a parent that holds it."""
    if not isinstance(module, nn.Module) or isinstance(module, QuantizedLayer):
        return False
    return kind_of(module) is not None


def has_inner_layers(module: nn.Module) -> bool:
    """Whether the layers inside are those of ``module`` itself, so that none is to be looked for below it."""
    if isinstance(module, QuantizedLayer):
        return True
    return isinstance(module, nn.MultiheadAttention) and not is_opened(module) and why_closed(module) is None


def is_opened(module: nn.Module) -> bool:
    """Whether the parts of ``module`` are modules already, in the place of one that held them as matrices."""
    return isinstance(module, QuantizedMultiheadAttention)


def why_closed(module: nn.Module) -> str | None:
    """Why the layers in a module must be left as they are; None if they need not."""
    if not isinstance(module, nn.MultiheadAttention) or is_opened(module):
        return None
    if why := why_own_way(module, nn.MultiheadAttention):
        return why
    if not isinstance(module.out_proj, nn.Linear) or isinstance(module.out_proj, Int8Weight):
        return f"its out_proj has the type {type(module.out_proj).__name__}"
    held = {*module._modules, *module._buffers, *module._parameters}
    if more := sorted(held - _HELD_BY_ATTENTION):
        return f"it holds {', '.join(more)} besides what nn.MultiheadAttention does"
    return None


_HELD_BY_ATTENTION = {f"{part}_proj_weight" for part in ("in", "q", "k", "v")}


_HELD_BY_ATTENTION |= {"in_proj_bias", "bias_k", "bias_v", "out_proj"}
