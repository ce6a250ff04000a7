"""Multi-head attention whose projections are layers of their own, each float or quantized."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from tinyq_lightning.errors import ModelError, ReadOnlyWeightError
from tinyq_lightning.layers.leaf import has_proxy, leaf_call
from tinyq_lightning.layers.linear import QuantizedLinear

__all__ = [
    "QuantizedMultiheadAttention",
    "in_projections",
    "linear_with",
]

_Projection = nn.Linear | QuantizedLinear


class QuantizedMultiheadAttention(nn.MultiheadAttention):
    """Takes the place of an ``nn.MultiheadAttention`` of which at least one projection is quantized.

    The float module keeps its projections as bare matrices and reads ``out_proj.weight``, so it never calls a
    layer for them. This module calls its projections as layers: ``in_proj`` (or ``q_proj``, ``k_proj``,
    ``v_proj`` if keys or values have sizes of their own) and ``out_proj``. So quantized ones run by their
    kernels. The state dict has their entries, such as ``in_proj.int8_weights``, ``in_proj.scales`` and
    ``in_proj.bias``. The attributes of the float module can be read; ``in_proj_weight`` and the others are
    read-only and dequantized when their values are read.

    Results are those of the float module's ordinary forward, not of its fused one for evaluation, which needs
    float weights. Nested tensors are accepted for self-attention, as by the float module.

    Args:
        attention: the float module. Its parameters are held, not copied.
    """

    in_proj: _Projection
    q_proj: _Projection
    k_proj: _Projection
    v_proj: _Projection

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        nn.Module.__init__(self)
        ours = {"_parameters", "_buffers", "_modules"}
        vars(self).update({name: value for name, value in vars(attention).items() if name not in ours})
        for name, linear in in_projections(attention).items():
            self.add_module(name, linear)
        self.out_proj = attention.out_proj
        self.bias_k, self.bias_v = attention.bias_k, attention.bias_v

    @property
    def in_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        """The weight of the joint projection ``[3·embed, embed]``, or None where there are three."""
        return self.in_proj.weight if self._qkv_same_embed_dim else None

    @property
    def q_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        """The weight of the queries' own projection ``[embed, embed]``, or None."""
        return None if self._qkv_same_embed_dim else self.q_proj.weight

    @property
    def k_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        """The weight of the keys' own projection ``[embed, kdim]``, or None."""
        return None if self._qkv_same_embed_dim else self.k_proj.weight

    @property
    def v_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        """The weight of the values' own projection ``[embed, vdim]``, or None."""
        return None if self._qkv_same_embed_dim else self.v_proj.weight

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        """The biases of the three projections ``[3·embed]``, or None."""
        if self._qkv_same_embed_dim:
            return self.in_proj.bias
        if self.q_proj.bias is None:
            return None
        return torch.cat([self.q_proj.bias, cast(Tensor, self.k_proj.bias), cast(Tensor, self.v_proj.bias)])

    def __delattr__(self, name: str) -> None:
        if name.endswith("_proj_weight"):
            raise ReadOnlyWeightError(
                f"{name} of {type(self).__name__} is a read-only view of codes, so it cannot be taken out, as PEFT and "
                "parametrizations do: leave the layer float with kinds or exclude"
            )
        super().__delattr__(name)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``.

        Args:
            query: ``[L, embed]``, ``[L, N, embed]``, or ``[N, L, embed]`` with ``batch_first``.
            key: likewise with ``S`` and ``kdim``.
            value: likewise with ``S`` and ``vdim``.
            key_padding_mask: ``[S]`` or ``[N, S]``; True, or what is added to the scores, for keys to ignore.
            need_weights: whether to return the attention's weights.
            attn_mask: ``[L, S]`` or ``[N·heads, L, S]``; True, or what is added to the scores.
            average_attn_weights: over the heads.
            is_causal: a hint that ``attn_mask`` is the causal mask.

        Returns:
            output: like ``query``.
            weights: ``[N, L, S]``, ``[N, heads, L, S]`` without averaging, either without ``N`` where
                ``query`` has none; None unless they are needed.

        Raises:
            ModelError: shapes that do not fit one another, or the hint without a mask.
        """
        if has_proxy(query, key, value):
            given = (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return leaf_call(self, *given)  # type: ignore[no-any-return]
        if query.is_nested or key.is_nested or value.is_nested:
            return self._forward_nested(query, key, value, key_padding_mask, attn_mask, need_weights)
        batched = query.dim() == 3
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            shapes = ", ".join(str(list(each.shape)) for each in (query, key, value))
            raise ModelError(f"attention takes query, key and value of 2 or of 3 dimensions each, got {shapes}")
        if is_causal and attn_mask is None:
            raise ModelError("is_causal is a hint about attn_mask: pass the causal mask too")
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = q[None], k[None], v[None]
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)

        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(q, k, key_padding_mask, attn_mask)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(k.shape[0], 1, -1)], 1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(v.shape[0], 1, -1)], 1)
        if self.add_zero_attn:
            k, v = nn.functional.pad(k, (0, 0, 0, 1)), nn.functional.pad(v, (0, 0, 0, 1))
        if mask is not None:  # no query is masked from the keys that were added
            mask = nn.functional.pad(mask, (0, k.shape[1] - mask.shape[-1]))

        q, k, v = (each.view(*each.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for each in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = nn.functional.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            heads = weights.to(v.dtype) @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            heads = nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        out = self.out_proj(heads.transpose(1, 2).flatten(2))
        if not batched:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self._qkv_same_embed_dim:
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        size = self.embed_dim
        if query is key is value:
            q, k, v = self.in_proj(query).chunk(3, -1)
        elif key is value:
            q = _rows(self.in_proj, query, slice(size))
            k, v = _rows(self.in_proj, key, slice(size, None)).chunk(2, -1)
        else:
            parts = (slice(size), slice(size, 2 * size), slice(2 * size, None))
            q, k, v = (_rows(self.in_proj, x, rows) for x, rows in zip((query, key, value), parts, strict=True))
        return q, k, v

    def _mask(self, q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Both masks as one that is added to the scores ``[N, heads, L, S]``, or broadcasts to them."""
        (batch, length, _), keys = q.shape, k.shape[1]
        added = None
        if mask is not None:
            if mask.shape not in ((length, keys), (batch * self.num_heads, length, keys)):
                raise ModelError(
                    f"attn_mask must be [{length}, {keys}] or [{batch * self.num_heads}, {length}, {keys}], "
                    f"got {list(mask.shape)}"
                )
            added = _additive(mask, q.dtype)
            added = added if mask.dim() == 2 else added.view(batch, self.num_heads, length, keys)
        if padding is not None:
            if padding.numel() != batch * keys:
                raise ModelError(f"key_padding_mask must be [{batch}, {keys}], got {list(padding.shape)}")
            ignored = _additive(padding, q.dtype).view(batch, 1, 1, keys)
            added = ignored if added is None else added + ignored
        return added

    def _forward_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        need_weights: bool,
    ) -> tuple[Tensor, None]:
        if key_padding_mask is not None or attn_mask is not None or need_weights:
            raise ModelError("attention takes nested tensors without masks, and with need_weights=False")
        if not (query is key is value and self.batch_first):
            raise ModelError("attention takes nested tensors for self-attention with batch_first=True")
        lengths = [len(part) for part in query.unbind()]
        padded = query.to_padded_tensor(0.0)
        places = torch.arange(padded.shape[1], device=padded.device)
        ignored = places >= torch.tensor(lengths, device=padded.device)[:, None]
        out, _ = self(padded, padded, padded, key_padding_mask=ignored, need_weights=False)
        parts = [row[:length] for row, length in zip(out, lengths, strict=True)]
        return torch.nested.as_nested_tensor(parts, layout=query.layout), None


def in_projections(attention: nn.MultiheadAttention) -> dict[str, nn.Linear]:
    """The projections that ``attention`` keeps as bare matrices, as Linears that hold the same parameters."""
    bias = attention.in_proj_bias
    if attention._qkv_same_embed_dim:
        return {"in_proj": linear_with(attention.in_proj_weight, bias)}
    biases = [None] * 3 if bias is None else bias.detach().chunk(3)
    return {
        f"{part}_proj": linear_with(
            getattr(attention, f"{part}_proj_weight"),
            None if each is None else nn.Parameter(each, requires_grad=bias.requires_grad),
        )
        for part, each in zip("qkv", biases, strict=True)
    }


def linear_with(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """A Linear that holds these very parameters."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.detach(), requires_grad=False)
    linear.bias = bias  # type: ignore[assignment]
    return linear


def _rows(linear: _Projection, input: Tensor, rows: slice) -> Tensor:
    """Some of the rows of a projection, as ``nn.MultiheadAttention`` takes them for cross-attention."""
    if isinstance(linear, QuantizedLinear):
        return linear.forward_rows(input, rows)
    return nn.functional.linear(input, linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
    if not mask.is_floating_point():
        raise ModelError(f"a mask must be boolean or floating point, this one is {mask.dtype}")
    return mask.to(dtype)
