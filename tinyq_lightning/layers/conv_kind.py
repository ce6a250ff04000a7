"""Convolutions as a kind of layer: how they are found, why one stays float, how it is made, timed and measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

from tinyq_lightning.kernels import Choice, choose_convolution
from tinyq_lightning.layers.computed import float_weight, sources_of
from tinyq_lightning.layers.conv import QuantizedConv
from tinyq_lightning.layers.conv_inputs import unfolded
from tinyq_lightning.layers.conv_sizes import conv_shape, weight_size
from tinyq_lightning.layers.convolutions import CONVOLUTIONS
from tinyq_lightning.layers.int8_weight import Int8Weight
from tinyq_lightning.layers.kind import Candidate, Kind, WeightSize
from tinyq_lightning.layers.own_forward import padding_of
from tinyq_lightning.layers.weight_hooks import without_weight_hooks
from tinyq_lightning.layers.why_float import why_holds_more, why_more_than, why_weight
from tinyq_lightning.methods import METHODS, KernelName

__all__ = [
    "ConvKind",
]


class ConvKind(Kind):
    """Torch's convolutions of one to three dimensions, transposed ones too, and subclasses that do what they do."""

    name = "conv"
    why_w8a32 = "a transposed convolution takes activations as they are"
    why_uncalibrated = None
    quantized_class = QuantizedConv

    @override
    def finds(self, module: nn.Module) -> bool:
        return isinstance(module, tuple(CONVOLUTIONS)) and not isinstance(module, Int8Weight)

    @override
    def candidates(self, module: nn.Module, closed: str | None) -> Iterator[Candidate]:
        why = closed or why_more_than(module, _torchs(module)) or why_weight(module) or why_holds_more(module)
        yield Candidate(self, module, {"weight": (module, "weight")}, why)

    @override
    def sizes(self, layer: Any) -> Mapping[str, WeightSize]:
        return {"weight": weight_size(layer)}

    @override
    def methods_of(self, layer: Any) -> tuple[str, ...]:
        return ("w8a32", "w4a32") if layer.transposed else self.methods

    @override
    def choice(self, layer: Any, method: str, kernel: KernelName) -> Choice | None:
        return choose_convolution(kernel, METHODS[method], conv_shape(layer))

    @override
    def make(self, layer: Any, codes: Mapping[str, Int8Weight], method: str, kernel: KernelName) -> QuantizedConv:
        weight = codes["weight"]
        quantized = CONVOLUTIONS[_torchs(layer)](layer, method, weight.dtype, "meta")
        quantized.kernel = kernel
        return quantized.share(weight).train(layer.training)

    @override
    def make_empty(self, layer: Any, method: str, kernel: KernelName) -> QuantizedConv:
        weight = float_weight(layer)
        quantized = CONVOLUTIONS[_torchs(layer)](layer, method, weight.dtype, weight.device)
        if quantized.bias is not None:
            quantized.bias = nn.Parameter(quantized.bias.detach().clone(), quantized.bias.requires_grad)
        quantized.kernel = kernel
        return quantized

    @override
    def plain(self, layer: nn.Module) -> nn.Module:
        computed = parametrize.is_parametrized(layer) or bool(sources_of(layer))
        if not computed or padding_of(layer) is not None:
            return layer
        plain = object.__new__(_torchs(layer))
        vars(plain).update({**vars(layer), "_forward_pre_hooks": without_weight_hooks(layer)})
        held = {"weight": float_weight(layer).detach(), "bias": cast("Tensor | None", layer.bias)}
        parameters = {name: None if each is None else nn.Parameter(each, False) for name, each in held.items()}
        vars(plain).update(_parameters=parameters, _modules={})
        return plain

    @override
    def tokens(self, layer: Any, x: Tensor) -> Tensor | None:
        return x.reshape(len(x) if x.dim() == len(layer.kernel_size) + 2 else 1, -1)

    @override
    def row_parts(self, layer: Any) -> int:
        return cast(int, layer.groups)

    @override
    def row_inputs(self, layer: Any, x: Tensor) -> Iterator[Tensor]:
        yield from unfolded(layer, x)

    @override
    def features(self, layer: Any, output: Tensor) -> Tensor:
        channels = output.dim() - len(layer.kernel_size) - 1
        return output.movedim(channels, -1).reshape(-1, output.shape[channels])


def _torchs(module: nn.Module) -> type[nn.Module]:
    """The class of torch that a convolution is, or is a subclass of."""
    return next(base for base in CONVOLUTIONS if isinstance(module, base))
