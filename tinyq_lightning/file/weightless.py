"""Modules built without memory for their parameters, which take their values from a file instead."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils import swap_tensors

__all__ = [
    "named_tensors",
    "put_value",
    "take_values",
    "without_weights",
]


@contextmanager
def without_weights() -> Iterator[Callable[[], bool]]:
    """Parameters that modules get inside the block are on the meta device; all else is made as ever.

    Each parameter has its memory until a module takes it, so there is one at a time. Its object stays the
    same, and with it every tie. Buffers are real: what ``__init__`` computes, and no file holds, is there.

    Yields:
        Whether a tensor on the meta device has been left behind by the block, wherever it may be held.
    """
    here, before = threading.get_ident(), _meta_tensors()

    def move(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if threading.get_ident() == here and type(parameter) is nn.Parameter and not parameter.is_meta:
            put_value(parameter, torch.empty_like(parameter, device="meta"))

    known = {id(tensor) for tensor in before}  # which `before` keeps alive, so their ids are theirs

    def leaves_any() -> bool:
        if any(id(tensor) not in known for tensor in _meta_tensors()):
            gc.collect()
        return any(id(tensor) not in known for tensor in _meta_tensors())

    handle = register_module_parameter_registration_hook(move)
    try:
        yield leaves_any
    finally:
        handle.remove()


def _meta_tensors() -> list[Tensor]:
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and thing.is_meta]


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers with their names; one that has several is given under each."""
    return chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))


def put_value(tensor: Tensor, value: Tensor) -> None:
    """Give a parameter or buffer the memory, dtype and device of ``value``; it stays the same object."""
    value = value.detach()  # an object of its own, since the two trade places
    swap_tensors(tensor, nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value)  # type: ignore[no-untyped-call]


def take_values(module: nn.Module, state_dict: Mapping[str, Tensor]) -> bool:
    """Give every tensor on the meta device the memory of the entry of its name, in the dtype it has.

    Returns:
        Whether there was an entry of the right shape for each of them.
    """
    taken = set()
    for name, tensor in named_tensors(module):
        value = state_dict.get(name)
        if tensor.is_meta:
            if value is None or value.shape != tensor.shape:
                return False
            shared = value.untyped_storage()._cdata in taken
            taken.add(value.untyped_storage()._cdata)
            put_value(tensor, value.to(tensor.dtype, copy=shared))
    return True
