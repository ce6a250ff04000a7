"""Turns checkpoint content into plain data and tensors, which ``torch.load(weights_only=True)`` reads."""

from __future__ import annotations

import copy
import sys
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import torch
from omegaconf import Container, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tinyq_lightning.errors import CheckpointError

__all__ = [
    "VERSION_TYPES",
    "as_plain_tensor",
    "can_be_held",
    "copied",
    "odd_version",
    "plain",
    "plain_entries",
    "plain_state",
]


VERSION_TYPES = (int, float, str, tuple, list, type(None))
"""What a module may have as its ``_version``: torch's own count from 1, others have texts."""


def plain_entries(entries: Mapping[str, Any], dropped: list[str]) -> dict[str, Any]:
    """The entries that can be plain data. The names of the others are added to ``dropped``."""
    kept = {}
    for key, value in entries.items():
        try:
            kept[plain(key)] = plain(value)
        except (TypeError, RecursionError, OmegaConfBaseException):
            dropped.append(str(key))
    return kept


def plain(value: Any) -> Any:
    """``value`` in types that ``torch.load(weights_only=True)`` reads. Equal strings become one object.

    Pickle refers to objects by identity, so otherwise equal content could give different bytes.

    Raises:
        TypeError: the value holds something that plain data cannot hold.
        RecursionError: the value contains itself.
        OmegaConfBaseException: an interpolation in the value cannot be resolved.
    """
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool | int | float | complex | bytes):
        kinds: tuple[type[Any], ...] = (int, float, complex, bytes)
        exact = value is None or type(value) in (bool, *kinds)
        return value if exact else next(kind(value) for kind in kinds if isinstance(value, kind))
    if isinstance(value, str | PurePath):
        return sys.intern(str(value))
    if isinstance(value, Tensor):
        if value.is_meta or not can_be_held(value):
            raise TypeError(type(value).__name__)
        return value.detach().cpu().resolve_conj().resolve_neg()
    if isinstance(value, torch.dtype | torch.device):
        return value
    if isinstance(value, Container):
        return plain(OmegaConf.to_container(value, resolve=True))
    if isinstance(value, Namespace):
        return plain(vars(value))
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        kind = next(kind for kind in (list, tuple, set, frozenset) if isinstance(value, kind))
        items = map(plain, value)
        return list(items) if kind is frozenset else kind(items)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return plain(value.item())  # a NumPy scalar
    raise TypeError(type(value).__name__)


def can_be_held(value: Tensor) -> bool:
    """Whether a file can hold a tensor: none of a subclass, dense or ``sparse_coo``, and not quantized by torch."""
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout in (torch.strided, torch.sparse_coo)
        and not (value.is_quantized or value.is_nested)
    )


def as_plain_tensor(value: Any) -> Any:
    """A tensor of a subclass as a plain one over the same memory, if it has memory of its own; else as it is."""
    if isinstance(value, Tensor) and type(value) not in (Tensor, nn.Parameter) and value.layout == torch.strided:
        return value if is_traceable_wrapper_subclass(value) else value.detach().as_subclass(Tensor)
    return value


def plain_state(state_dict: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """A state dict as plain data, with the version numbers that modules keep in it.

    Tensors that share memory still share it. A tensor that is a part of a larger one is copied out of it.

    Raises:
        CheckpointError: an entry, such as a module's extra state, or a module's version is not plain data.
    """
    state: OrderedDict[str, Any] = OrderedDict()
    for name, value in state_dict.items():
        try:
            item = plain(as_plain_tensor(value))
        except TypeError as error:
            raise CheckpointError(
                f"the state dict's entry {name!r} holds a {error}, and a quantized checkpoint plain data only: "
                "let the module's get_extra_state return tensors, numbers, text, lists and dicts"
            ) from error
        dense = isinstance(item, Tensor) and item.layout == torch.strided
        if dense and item.untyped_storage().nbytes() != item.numel() * item.element_size():
            item = item.clone()
        state[plain(name)] = item
    if hasattr(state_dict, "_metadata"):
        if odd := odd_version(state_dict):
            raise CheckpointError(f"{odd}, and a quantized checkpoint holds plain data only: make it a number or text")
        state._metadata = plain(state_dict._metadata)  # type: ignore[attr-defined]
    return state


def odd_version(state_dict: Mapping[str, Any]) -> str | None:
    """What a module has set as its ``_version`` that no file holds; None if none has."""
    for name, noted in (getattr(state_dict, "_metadata", None) or {}).items():
        version = noted.get("version")
        if type(version) not in VERSION_TYPES:
            owner = f"the module {name!r}" if name else "the model"
            return f"the _version of {owner} is of the type {type(version).__name__}"
    return None


def copied(value: Any, done: dict[int, Any] | None = None) -> Any:
    """``value`` with copies of its plain containers at every depth; all else stays the same object."""
    done = {} if done is None else done
    if type(value) not in (dict, OrderedDict, list, tuple):
        return value
    if id(value) in done:
        return done[id(value)]
    if type(value) is tuple:
        done[id(value)] = tuple(copied(item, done) for item in value)
    else:
        done[id(value)] = result = copy.copy(value)  # keeps attributes, such as _metadata of a state dict
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            result[key] = copied(item, done)
    return done[id(value)]
