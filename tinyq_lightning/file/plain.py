"""Checkpoint content as plain data and tensors: what ``torch.load(weights_only=True)`` reads."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import torch
from omegaconf import Container, OmegaConf
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tinyq_lightning.errors import CheckpointError

__all__ = [
    "as_plain_tensor",
    "kind_of_config",
    "plain",
    "plain_entries",
    "plain_state",
    "restore_config",
]


def plain_entries(entries: Any, prefix: str, dropped: list[str]) -> dict[str, Any]:
    """The entries that plain data can hold; the names of the others go to ``dropped``."""
    if isinstance(entries, Container):
        entries = OmegaConf.to_container(entries, resolve=True)
    kept = {}
    for key, value in dict(entries).items():
        try:
            kept[plain(key)] = plain(value)
        except TypeError:
            dropped.append(f"{prefix}.{key}".removeprefix("."))
    return kept


def plain(value: Any) -> Any:
    """``value`` in types that ``torch.load(weights_only=True)`` reads; equal text becomes one object.

    That makes the bytes of a file depend on its content alone: pickle refers back to objects by identity.

    Raises:
        TypeError: there is something in it that plain data cannot hold.
    """
    if value is None or isinstance(value, bool | int | float | complex | bytes):
        return value if type(value) in (type(None), bool, int, float, complex, bytes) else _plain_subclass(value)
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, str):
        return sys.intern(str(value))
    if isinstance(value, PurePath):
        return sys.intern(str(value))
    if isinstance(value, Tensor):
        return (
            value.detach().cpu().resolve_conj().resolve_neg()
            if type(value) in (Tensor, nn.Parameter)
            else _refuse(value)
        )
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
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a NumPy scalar
        return plain(value.item())
    return _refuse(value)


def _plain_subclass(value: Any) -> Any:
    if isinstance(value, Enum):
        return plain(value.value)
    kinds: tuple[type[Any], ...] = (int, float, complex, bytes)
    return next(kind(value) for kind in kinds if isinstance(value, kind))


def _refuse(value: Any) -> Any:
    raise TypeError(type(value).__name__)


def as_plain_tensor(value: Any) -> Any:
    """A tensor of a subclass as a plain one over the same memory, if it has memory of its own; else as it is."""
    if isinstance(value, Tensor) and type(value) not in (Tensor, nn.Parameter) and value.layout == torch.strided:
        return value if is_traceable_wrapper_subclass(value) else value.detach().as_subclass(Tensor)
    return value


def plain_state(state_dict: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """A state dict as plain data, with the version numbers that modules keep in it.

    Tensors that share memory still do; a tensor that is a part of something larger is copied out of it.

    Raises:
        CheckpointError: an entry, such as a module's extra state, is more than plain data.
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
        state._metadata = plain(state_dict._metadata)  # type: ignore[attr-defined]
    return state


def kind_of_config(value: Any) -> str | None:
    """What a hyper-parameter must be turned back into where plain data took its place: attributes are read of it."""
    if isinstance(value, Container):
        return "omegaconf"
    return "namespace" if isinstance(value, Namespace) else None


def restore_config(kind: str, value: Any) -> Any:
    """Plain data as what :func:`kind_of_config` saw before."""
    return OmegaConf.create(value) if kind == "omegaconf" else Namespace(**value)
