"""An embedding with int8 weights, tied to a linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Self

from tinyq_lightning.layers.int8_weight import Int8Weight
from tinyq_lightning.layers.leaf import has_proxy, leaf_call

__all__ = [
    "QuantizedEmbedding",
    "ScaledQuantizedEmbedding",
]


class QuantizedEmbedding(Int8Weight):
    """Look-ups in the int8 weight of a linear layer that an ``nn.Embedding`` is tied to.

    The buffers are those of the linear layer: ``int8_weights`` ``[num, dim]`` int8, ``scales`` ``[num]``
    float32. A row comes out as its codes times its scale.

    Args:
        num_embeddings: rows.
        embedding_dim: size of each row.
        padding_idx: kept because other code may read it; it concerns gradients of the weight, which int8 weights lack.
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
        if has_proxy(input):
            return leaf_call(self, input)  # type: ignore[no-any-return]
        return self._look_up(input)

    def _look_up(self, input: Tensor) -> Tensor:
        work = torch.float64 if self.dtype == torch.float64 else torch.float32
        codes = nn.functional.embedding(input, self.int8_weights)
        scales = nn.functional.embedding(input, self.scales[:, None])
        return torch.mul(codes.to(work), scales).to(self.dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows in the brackets."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, dtype={self.dtype}"


class ScaledQuantizedEmbedding(QuantizedEmbedding):
    """Look-ups whose rows are multiplied by a number, as in Gemma and in BART.

    Args:
        num_embeddings: rows.
        embedding_dim: size of each row.
        padding_idx: as in :class:`QuantizedEmbedding`.
        dtype: floating dtype of what is looked up.
        device: where the layer lives.
        output_scale: what each row is multiplied by.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        output_scale: float = 1.0,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, dtype, device)
        self.output_scale = output_scale

    def _look_up(self, input: Tensor) -> Tensor:
        return super()._look_up(input) * self.output_scale

    def extra_repr(self) -> str:
        """What ``print(model)`` shows in the brackets."""
        return f"{super().extra_repr()}, output_scale={self.output_scale:g}"
