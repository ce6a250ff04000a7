"""Weights of four bits in a state dict: packed there, expanded to int8 codes in the layer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tinyq_lightning.kernels import collapse, expand, multipliers_of, packed_shapes

__all__ = [
    "expanded_codes",
    "load_four_bits",
    "packed_codes",
    "why_not_packed",
]

# The packed codes by their multipliers: layers that share a weight have the same tensor in a state dict.
_packed: MutableMapping[Tensor, weakref.ref[Tensor]] = WeakTensorKeyDictionary()


def packed_codes(codes: Tensor, multipliers: Tensor) -> Tensor:
    """Packed codes of a weight; the same tensor as before while that is alive and nothing has changed.

    Args:
        codes: ``multiplier * code``, ``[rows, columns]`` int8.
        multipliers: ``[rows, ceil(groups / 2)]`` uint8, packed; a buffer of the layer.

    Returns:
        ``[rows, ceil(columns / 2)]`` uint8.
    """
    made = collapse(codes, multipliers)
    if made.is_meta:
        return made
    former = _packed[multipliers]() if multipliers in _packed else None
    if former is not None and former.device == made.device and torch.equal(former, made):
        return former
    _packed[multipliers] = weakref.ref(made)
    return made


def load_four_bits(
    load: Callable[..., None],
    shape: Sequence[int],
    from_rows: Callable[[Tensor], Tensor],
    state_dict: Mapping[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """A layer's ``_load_from_state_dict`` for packed codes, which the layer holds expanded.

    Args:
        load: that of ``nn.Module``.
        shape: rows and columns of the weight.
        from_rows: brings codes ``[rows, columns]`` into the shape of the weight.
        state_dict: and what follows: as torch calls it.
        prefix: of the layer, with its dot.
        local_metadata: of the layer.
        strict: whether unexpected keys are to be told.
        missing_keys: is added to.
        unexpected_keys: is added to.
        error_msgs: is added to.
    """
    own, packed = f"{prefix}int8_weights", f"{prefix}int4_weights"
    codes, wrong = expanded_codes(state_dict, prefix, shape)
    # nothing of a malformed weight is loaded: codes and multipliers hold together
    left_out = {own, packed, f"{prefix}multipliers"} if wrong else {own, packed}
    state = {key: value for key, value in state_dict.items() if key not in left_out}
    state |= {} if codes is None else {own: from_rows(codes)}
    missing = list[str]()
    load(state, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
    names = [packed if key == own else key for key in missing]
    missing_keys += [key for key in names if key not in state_dict]
    unexpected_keys += [own] if strict and own in state_dict else []
    error_msgs += [wrong] if wrong else []


def expanded_codes(state_dict: Mapping[str, Any], prefix: str, shape: Sequence[int]) -> tuple[Tensor | None, str]:
    """The int8 codes of a weight whose packed codes are in a state dict.

    Args:
        state_dict: with ``int4_weights`` and ``multipliers`` below the prefix, or without.
        prefix: of the weight, with its dot.
        shape: rows and columns of the weight.

    Returns:
        codes: ``[rows, columns]`` int8; None if there are none, or malformed ones.
        wrong: what is malformed, in words; empty if nothing is.
    """
    packed, multipliers = state_dict.get(f"{prefix}int4_weights"), state_dict.get(f"{prefix}multipliers")
    if packed is None or multipliers is None:
        return None, ""
    if wrong := why_not_packed(packed, multipliers, shape):
        return None, prefix + wrong
    return expand(packed, multipliers.to(packed.device), shape[1]), ""


def why_not_packed(packed: Any, multipliers: Any, shape: Sequence[int]) -> str:
    """What is wrong with packed codes or multipliers of a weight of some rows and columns; empty if nothing is."""
    for name, given, wanted in zip(
        ("int4_weights", "multipliers"), (packed, multipliers), packed_shapes(shape[0], shape[1]), strict=True
    ):
        if not isinstance(given, Tensor) or given.dtype != torch.uint8 or given.layout != torch.strided:
            return f"{name} holds no codes of {torch.uint8}"
        if given.shape != wanted:
            return f"{name} has the shape {list(given.shape)}, and a weight of {list(shape)} has {list(wanted)}"
    if not multipliers.is_meta and not bool(multipliers_of(multipliers, shape[1]).all()):
        return "multipliers holds a zero: each must be 1 to 15"
    return ""
