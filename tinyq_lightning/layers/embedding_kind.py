"""The kinds of layer that look rows up: ``nn.Embedding`` and ``nn.EmbeddingBag``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from tinyq_lightning.kernels import Choice, choose_lookup_kernel
from tinyq_lightning.layers.behaviour import computes_scaled_embedding
from tinyq_lightning.layers.computed import float_weight
from tinyq_lightning.layers.embedding import QuantizedEmbedding, QuantizedEmbeddingBag, ScaledQuantizedEmbedding
from tinyq_lightning.layers.int8_weight import Int8Weight
from tinyq_lightning.layers.kind import Candidate, Kind, WeightSize, first_tensor
from tinyq_lightning.layers.quantized_layer import QuantizedLayer
from tinyq_lightning.layers.why_float import is_torchs, why_holds_more, why_more_than, why_own_way, why_weight
from tinyq_lightning.methods import METHODS, KernelName

__all__ = [
    "EmbeddingBagKind",
    "EmbeddingKind",
]


class _LookUpKind(Kind):
    """Layers that look rows up. They take indices, so that there are no activations to hold by a method."""

    name = "embedding"
    methods = ("w8a32", "w4a32")
    why_w8a32 = "a look-up has no activations"
    why_uncalibrated = "its rows are looked up, not multiplied"

    @override
    def candidates(self, module: nn.Module, closed: str | None) -> Iterator[Candidate]:
        renorms = "max_norm rewrites its rows" if getattr(module, "max_norm", None) is not None else None
        why = closed or renorms or self.why_more(module) or why_weight(module) or why_holds_more(module)
        yield Candidate(self, module, {"weight": (module, "weight")}, why)

    @override
    def sizes(self, layer: Any) -> Mapping[str, WeightSize]:
        return {"weight": WeightSize((layer.num_embeddings, layer.embedding_dim), layer.num_embeddings)}

    @override
    def choice(self, layer: Any, method: str, kernel: KernelName) -> Choice | None:
        return choose_lookup_kernel(
            kernel, layer.num_embeddings * layer.embedding_dim, float_weight(layer).dtype, METHODS[method].bits
        )

    @override
    def make(self, layer: Any, codes: Mapping[str, Int8Weight], method: str, kernel: KernelName) -> QuantizedLayer:
        made = self.make_empty(layer, method, kernel, "meta")
        return made.share(codes["weight"]).train(layer.training)

    @override
    def make_empty(self, layer: Any, method: str, kernel: KernelName, device: Any = None) -> QuantizedLayer:
        made = self.made(layer, device or float_weight(layer).device, method)
        made.kernel = kernel
        return made

    @override
    def example(
        self, layer: Any, amount: int, sizes: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
    ) -> tuple[Any, ...]:
        return (torch.randint(layer.num_embeddings, sizes, generator=generator).to(dtype),)

    @abstractmethod
    def why_more(self, module: nn.Module) -> str | None:
        """Why a module is more than its torch class; None if it is not."""

    @abstractmethod
    def made(self, layer: Any, device: Any, method: str) -> QuantizedLayer:
        """A quantized layer with the settings of a float one."""


class EmbeddingKind(_LookUpKind):
    """``nn.Embedding``, and subclasses of it that multiply its rows by a number."""

    quantized_class = QuantizedEmbedding

    @override
    def finds(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding) and not isinstance(module, QuantizedLayer)

    @override
    def why_more(self, module: nn.Module) -> str | None:
        return why_more_than(module, nn.Embedding)

    @override
    def made(self, layer: Any, device: Any, method: str) -> QuantizedLayer:
        weight = float_weight(layer)
        (rows, columns), dtype = weight.shape, weight.dtype
        scale = None if is_torchs(layer, nn.Embedding) else computes_scaled_embedding(layer)
        if scale is None or scale == 1:
            return QuantizedEmbedding(rows, columns, layer.padding_idx, dtype, device, method)
        return ScaledQuantizedEmbedding(rows, columns, layer.padding_idx, dtype, device, scale, method)


class EmbeddingBagKind(_LookUpKind):
    """``nn.EmbeddingBag``."""

    quantized_class = QuantizedEmbeddingBag

    @override
    def finds(self, module: nn.Module) -> bool:
        return isinstance(module, nn.EmbeddingBag) and not isinstance(module, QuantizedLayer)

    @override
    def why_more(self, module: nn.Module) -> str | None:
        return why_own_way(module, nn.EmbeddingBag)

    @override
    def made(self, layer: Any, device: Any, method: str) -> QuantizedLayer:
        return QuantizedEmbeddingBag(layer, float_weight(layer).dtype, device, method)

    @override
    def size_of_call(self, layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
        x, count = first_tensor(args, kwargs), first_tensor(args, kwargs).numel()
        given = [*args[1:2], *(value for name, value in kwargs.items() if name == "offsets")]
        if x.dim() == 2 or not given or given[0] is None or not len(given[0]):
            return count, tuple(x.shape)
        bags = len(given[0])  # of different lengths: timed as of their mean length
        return count, (bags, max(1, count // bags))
