"""Look-ups in int8 rows: what takes the place of ``nn.Embedding`` and ``nn.EmbeddingBag``."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from tinyq_lightning.kernels import (
    Choice,
    FbgemmRows,
    Float32Weights,
    NibbleWeights,
    WeightForm,
    choose_lookup_kernel,
    in_transform,
    is_recorded,
    weight_form,
)
from tinyq_lightning.layers.int8_weight import Int8Weight
from tinyq_lightning.layers.leaf import has_proxy, leaf_call
from tinyq_lightning.methods import METHODS

__all__ = [
    "QuantizedEmbedding",
    "QuantizedEmbeddingBag",
    "ScaledQuantizedEmbedding",
]


class _LookUp(Int8Weight):
    """A table whose rows are looked up: each its codes times its scale."""

    num_embeddings: int
    embedding_dim: int
    _choice: Choice | None = None

    def __init__(
        self, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str | None, method: str
    ) -> None:
        super().__init__(rows, columns, dtype, device)
        self.num_embeddings, self.embedding_dim, self.method = rows, columns, method
        if METHODS[method].bits == 4:
            self._hold_four_bits()

    @property
    def choice(self) -> Choice:
        """The form of the table that is looked up, and why."""
        if self._choice is None:
            values = self.num_embeddings * self.embedding_dim
            self._choice = choose_lookup_kernel(self.kernel, values, self.dtype, self.bits)
        return self._choice

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("kernel", "dtype"):
            self._choice = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_choice": None}  # of this machine and its environment

    def _new_form(self, kernel: str) -> WeightForm:
        if kernel != "int8-rows":
            return super()._new_form(kernel)
        return weight_form(kernel, self.int8_weights, self.scales, FbgemmRows)

    def _packed_rows(self, input: Tensor) -> FbgemmRows | None:
        """The rows packed for look-ups of ``input``; None where it is looked up in another form."""
        if type(input) is not Tensor or not input.is_cpu or is_recorded():
            return None  # before the choice, whose questions to this machine no graph can hold
        choice = self._choice or self.choice  # without the property, because a microsecond counts where rows are few
        if choice.kernel != "int8-rows":
            return None
        scales, form = self._buffers["scales"], cast("FbgemmRows | None", self._forms.get("int8-rows"))
        if form is None or self._buffers["int8_weights"] is not None or not form.is_current(None, scales):  # type: ignore[arg-type]
            if not scales.is_cpu:  # type: ignore[union-attr]
                return None
            form = cast("FbgemmRows | None", self.form("int8-rows"))
        return form if form is not None and form.is_exact else None

    def _float_table(self) -> Tensor | None:
        """A float32 copy of a small table, whose rows have the bits of :meth:`_rows`; None for others."""
        if _is_traced() or self.choice.kernel != "float32":
            return None
        form = cast("Float32Weights | None", self.form("float32"))
        return None if form is None else form.weight

    def _rows(self, input: Tensor) -> Tensor:
        """``input`` ``[...]`` of integers → ``[..., dim]`` of the layer's dtype."""
        work = torch.float64 if self.dtype == torch.float64 else torch.float32
        packed = self.form("int4") if not _is_traced() and self.choice.kernel == "int4" else None
        if packed is None:
            rows = torch.embedding(self.int8_weights, input)
        else:
            rows = cast(NibbleWeights, packed).rows(input.reshape(-1)).view(*input.shape, self.embedding_dim)
        scales = torch.embedding(self.scales[:, None], input)
        return rows.to(work).mul_(scales).to(self.dtype)  # in place: large batches need no further memory


def _is_traced() -> bool:
    """Whether a graph is made of the call, which is to see plain codes."""
    return torch.compiler.is_compiling() or in_transform()


class QuantizedEmbedding(_LookUp, nn.Embedding):  # type: ignore[override]
    """Takes the place of an ``nn.Embedding``, of which it is a subclass as ``QuantizedLinear`` is one of ``nn.Linear``.

    The buffers are ``int8_weights`` ``[num, dim]`` int8 and ``scales`` ``[num]`` float32, with four bits also
    ``multipliers``, shared with a layer whose weight the embedding is tied to. A row comes out as its codes times its
    scale. A look-up reads the rows that it needs and no others.

    Args:
        num_embeddings: rows.
        embedding_dim: size of each row.
        padding_idx: kept because other code may read it; it concerns gradients of the weight, which int8 weights lack,
            as ``scale_grad_by_freq`` and ``sparse`` do.
        dtype: floating dtype of what is looked up.
        device: where the layer lives.
        method: ``w8a32`` or ``w4a32``.
    """

    max_norm = None
    norm_type = 2.0
    scale_grad_by_freq = False
    sparse = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        method: str = "w8a32",
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, device, method)
        self.padding_idx = padding_idx

    def forward(self, input: Tensor) -> Tensor:
        """``input`` ``[...]`` of integers → ``[..., dim]`` of the layer's dtype."""
        packed = self._packed_rows(input)
        if packed is not None:
            try:
                rows = packed.rows(input)
            except RuntimeError:
                pass  # an index is beyond the table, which is told below
            else:
                return rows if self.dtype is torch.float32 else rows.to(self.dtype)
        elif type(input) is not Tensor and has_proxy(input):
            return leaf_call(self, input)  # type: ignore[no-any-return]
        table = self._float_table()
        return self._rows(input) if table is None else nn.functional.embedding(input, table)

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
        method: ``w8a32`` or ``w4a32``.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        output_scale: float = 1.0,
        method: str = "w8a32",
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, dtype, device, method)
        self.output_scale = output_scale

    def forward(self, input: Tensor) -> Tensor:
        """``input`` ``[...]`` of integers → ``[..., dim]`` of the layer's dtype, multiplied by the number."""
        if type(input) is not Tensor and has_proxy(input):
            return leaf_call(self, input)  # type: ignore[no-any-return]
        return super().forward(input) * self.output_scale

    def extra_repr(self) -> str:
        """What ``print(model)`` shows in the brackets."""
        return f"{super().extra_repr()}, output_scale={self.output_scale:g}"


class QuantizedEmbeddingBag(_LookUp, nn.EmbeddingBag):  # type: ignore[override]
    """Takes the place of an ``nn.EmbeddingBag``: the rows that are needed are looked up, and reduced as it does.

    Args:
        bag: the float layer, whose settings are taken.
        dtype: floating dtype of the result.
        device: where the layer lives.
        method: ``w8a32`` or ``w4a32``.
    """

    def __init__(
        self,
        bag: nn.EmbeddingBag,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        method: str = "w8a32",
    ) -> None:
        super().__init__(bag.num_embeddings, bag.embedding_dim, dtype, device, method)
        self.max_norm, self.norm_type, self.scale_grad_by_freq = bag.max_norm, bag.norm_type, bag.scale_grad_by_freq
        self.mode, self.sparse, self.include_last_offset = bag.mode, bag.sparse, bag.include_last_offset
        self.padding_idx = bag.padding_idx

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """As ``nn.EmbeddingBag.forward``.

        Args:
            input: ``[bags, n]`` of integers, or ``[n]`` with ``offsets``.
            offsets: where each bag begins in ``input``.
            per_sample_weights: factors of the rows, like ``input``; only for sums.

        Returns:
            ``[bags, dim]`` of the layer's dtype.
        """
        if type(input) is not Tensor and has_proxy(input, offsets, per_sample_weights):
            return leaf_call(self, input, offsets, per_sample_weights)  # type: ignore[no-any-return]
        sums = self._packed_sums(input, offsets, per_sample_weights)
        if sums is not None:
            return sums
        table = self._float_table()
        if table is not None:
            return self._reduced(input, table, offsets, per_sample_weights, padding_idx=self.padding_idx)
        if input.dim() == 2 and input.shape[1] and self.padding_idx is None and per_sample_weights is offsets is None:
            return self._reduced_rows(self._rows(input))
        rows = self._rows(input.reshape(-1))
        places = torch.arange(input.numel(), device=input.device).view(input.shape)
        if self.padding_idx is None:
            return self._reduced(places, rows, offsets, per_sample_weights)
        # torch's operator fixes the number of rows of its table where it is told of padding, so it is not told here
        counted = input != self.padding_idx % self.num_embeddings
        if per_sample_weights is not None:
            per_sample_weights = per_sample_weights.masked_fill(~counted, 0.0)
        rows = rows.masked_fill(~counted.reshape(-1, 1), -math.inf if self.mode == "max" else 0.0)
        if self.mode != "mean":
            reduced = self._reduced(places, rows, offsets, per_sample_weights)
            return reduced.masked_fill(reduced == -math.inf, 0.0) if self.mode == "max" else reduced
        sums = self._reduced(places, rows, offsets, per_sample_weights, "sum")
        if offsets is None:
            return sums / counted.sum(1, keepdim=True).clamp_min(1)
        lengths = _lengths(offsets, input.numel(), counted.float(), self.include_last_offset)
        return (sums / lengths).to(sums.dtype)

    def _packed_sums(self, input: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor | None:
        """The sums or means of bags of packed rows; None where they are reduced in another way."""
        if self.mode == "max" or self.dtype is not torch.float32 or (input.dim() == 2) != (offsets is None):
            return None
        if not all(each is None or each.is_cpu for each in (offsets, weights)):
            return None
        if weights is not None and (self.mode != "sum" or weights.requires_grad or weights.shape != input.shape):
            return None
        packed = self._packed_rows(input) if input.numel() else None
        if packed is None:
            return None
        begins = offsets
        if begins is None:
            begins = torch.arange(0, input.numel(), input.shape[1], dtype=input.dtype, device=input.device)
        elif begins.dtype != input.dtype or begins.dim() != 1 or not len(begins) or begins[0]:
            return None
        factors = None if weights is None else weights.reshape(-1)
        counted = None
        if self.padding_idx is not None:
            counted = (input != self.padding_idx % self.num_embeddings).float().view(-1)
            factors = counted if factors is None else counted * factors
        includes_last = offsets is not None and self.include_last_offset
        try:
            sums = packed.sums(input.reshape(-1), begins, factors, includes_last)
        except RuntimeError:  # an index is beyond the table: who comes next tells it
            return None
        if self.mode == "sum":
            return sums
        if offsets is None and counted is None:
            return sums.div_(input.shape[1])
        return sums.div_(_lengths(begins, input.numel(), counted, includes_last))

    def _reduced_rows(self, rows: Tensor) -> Tensor:
        """``[bags, n, dim]`` → ``[bags, dim]``: bags of one length, which torch reduces faster than others."""
        if self.mode == "max":
            return rows.amax(1)
        return rows.sum(1) if self.mode == "sum" else rows.mean(1)

    def _reduced(
        self,
        input: Tensor,
        table: Tensor,
        offsets: Tensor | None,
        per_sample_weights: Tensor | None,
        mode: str | None = None,
        padding_idx: int | None = None,
    ) -> Tensor:
        if offsets is not None and offsets.dtype != input.dtype:
            input, offsets = input.long(), offsets.long()
        return nn.functional.embedding_bag(
            input,
            table,
            offsets,
            mode=mode or self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding_idx,
        )

    def extra_repr(self) -> str:
        """What ``print(model)`` shows in the brackets."""
        shown: dict[str, Any] = {"mode": self.mode, "dtype": self.dtype}
        if self.padding_idx is not None:
            shown["padding_idx"] = self.padding_idx
        settings = ", ".join(f"{name}={value}" for name, value in shown.items())
        return f"{self.num_embeddings}, {self.embedding_dim}, {settings}"


def _lengths(begins: Tensor, total: int, counted: Tensor | None, includes_last: bool) -> Tensor:
    """How many rows each bag has, ``[bags, 1]`` float32; 1 for an empty bag.

    Args:
        begins: where each bag begins among ``total`` indices, and the end of the last if ``includes_last``.
        total: the number of indices.
        counted: ``[total]`` float32, 0 at an index that does not count; None if all do.
        includes_last: as above.
    """
    ends = begins if includes_last else torch.cat([begins, begins.new_full((1,), total)])
    if counted is None:
        lengths = ends.diff()
    else:
        before = torch.cat([counted.new_zeros(1, dtype=torch.float64), counted.cumsum(0, dtype=torch.float64)])
        lengths = before[ends].diff()
    return lengths.clamp_min_(1).float()[:, None]
