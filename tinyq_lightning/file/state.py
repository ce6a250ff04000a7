"""What a quantized file can hold of a state dict, asked before the training rather than after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tinyq_lightning.errors import ModelError
from tinyq_lightning.file.plain import as_plain_tensor, can_be_held, odd_version, plain

__all__ = [
    "check_state",
]


def check_state(state_dict: Mapping[str, Any]) -> None:
    """Refuse a state dict that a quantized file cannot hold. No values are read.

    Raises:
        ModelError: an entry is a tensor that is neither dense nor ``sparse_coo``, or quantized by torch, or it or a
            module's version is more than plain data.
    """
    for name, value in state_dict.items():
        tensor = as_plain_tensor(value)
        if isinstance(tensor, Tensor):
            if can_be_held(tensor):
                continue
            of = tensor.dtype if tensor.is_quantized else f"layout {str(tensor.layout).removeprefix('torch.')}"
            what = f"a {type(tensor).__name__} of {of}"
            cure = "register it with persistent=False and make it in __init__, or give TinyQCallback save=False"
        else:
            try:
                plain(value)
                continue
            except TypeError as error:
                what = f"a {error}"
                cure = "let get_extra_state return tensors, numbers, text, lists and dicts, or give save=False"
        raise ModelError(f"the state dict's entry {name!r} is {what}, which a quantized checkpoint cannot hold: {cure}")
    if odd := odd_version(state_dict):
        raise ModelError(
            f"{odd}, which a quantized checkpoint cannot hold: make it a number or text, or give save=False"
        )
