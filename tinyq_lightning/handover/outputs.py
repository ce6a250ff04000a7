"""What a method returns, as graphs hold it: tensors in tuples, lists and dicts, without classes of anyone's own."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tinyq_lightning.handover.example import PLAIN, flat_names, part_of

__all__ = [
    "emptied",
    "filled",
    "others_of",
    "portable",
    "tensors_of",
    "visible",
]


def visible(outputs: Any) -> Any:
    """The same with dicts in the place of dataclasses, in which torch would find no tensor."""
    return pytree.tree_map(lambda leaf: visible(_fields(leaf)) if _is_dataclass(leaf) else leaf, outputs)


def portable(outputs: Any) -> Any:
    """The same in plain containers, so that a file that holds their structure loads without the classes.

    A mapping, a dataclass and a class that is registered with torch's pytree become dicts; a named tuple a tuple; and
    an object of another class None.
    """
    return _plain(visible(outputs))


def others_of(outputs: Any) -> list[str]:
    """What is no tensor and no plain value: the name and the class of each."""
    named = flat_names(visible(outputs), "output")
    return [f"{name} (a {type(leaf).__name__})" for name, leaf in named if not isinstance(leaf, PLAIN)]


def tensors_of(outputs: Any) -> list[Tensor]:
    """The tensors, in the order of torch's pytree."""
    return [leaf for leaf in pytree.tree_leaves(visible(outputs)) if isinstance(leaf, Tensor)]


def emptied(outputs: Any) -> Any:
    """The structure, plain values and dtypes alone: tensors of no device's memory, and None for any other object."""
    return filled(outputs, (torch.empty(0, dtype=each.dtype, device="meta") for each in tensors_of(outputs)))


def filled(outputs: Any, tensors: Iterator[Tensor]) -> Any:
    """The same structure, dataclasses included, with other tensors, and with None for objects that graphs do not hold.

    What a dataclass computed of its fields is left out, since it belongs to the former tensors.

    Args:
        outputs: what a method returned.
        tensors: one for each of its tensors, in the order of :func:`tensors_of`.
    """

    def changed(leaf: Any) -> Any:
        if not _is_dataclass(leaf):
            if isinstance(leaf, Tensor):
                return next(tensors)
            return leaf if isinstance(leaf, PLAIN) else None
        made, fields = copy.copy(leaf), _fields(leaf)
        for name in getattr(leaf, "__dict__", {}).keys() - fields.keys():
            del made.__dict__[name]
        for name, value in fields.items():
            object.__setattr__(made, name, filled(value, tensors))
        return made

    return pytree.tree_map(changed, outputs)


def _is_dataclass(leaf: Any) -> bool:
    return dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)


def _fields(leaf: Any) -> dict[str, Any]:
    return {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        return (list if isinstance(value, list) else tuple)(_plain(each) for each in value)
    node = pytree.SUPPORTED_NODES.get(type(value))
    if node is None:
        return value if isinstance(value, PLAIN) else None
    if node.flatten_with_keys_fn is None:
        return tuple(_plain(each) for each in node.flatten_fn(value)[0])
    return {part_of(key): _plain(each) for key, each in node.flatten_with_keys_fn(value)[0]}
