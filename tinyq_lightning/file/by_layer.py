"""A module on the meta device whose tensors get their values one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from tinyq_lightning.file.weightless import named_tensors, put_value, restore_weak_references

__all__ = [
    "ByLayer",
]


class ByLayer:
    """Reads the tensors of a module when they are needed.

    Args:
        module: its tensors are on the meta device, or those of them that have no value yet.
        read: gives the value of an entry of its state dict, by the name there.
    """

    def __init__(self, module: nn.Module, read: Callable[[str], Tensor]) -> None:
        self._module, self._read_entry = module, read
        own = cast("Mapping[str, Any]", module.state_dict(keep_vars=True))
        # by identity: a parameter stays the same object when it gets a value or another layer takes it
        self._names = {id(tensor): (tensor, name) for name, tensor in own.items() if isinstance(tensor, Tensor)}

    def knows(self, tensor: Tensor) -> bool:
        """Whether the state dict has the tensor."""
        return id(tensor) in self._names

    @contextmanager
    def present(self, layer: nn.Module) -> Iterator[None]:
        """Context manager in which the parameters and buffers of ``layer`` have their values."""
        waiting = {id(tensor): tensor for _, tensor in named_tensors(layer) if tensor.is_meta}
        for tensor in waiting.values():
            self._read(tensor)
        try:
            yield
        finally:
            for tensor in waiting.values():
                put_value(tensor, torch.empty_like(tensor, device="meta"))

    def fill(self) -> None:
        """Read every tensor that is still on the meta device."""
        for tensor in self._module.state_dict(keep_vars=True).values():
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._read(tensor)
        restore_weak_references(self._module)

    def _read(self, tensor: Tensor) -> None:
        put_value(tensor, self._read_entry(self._names[id(tensor)][1]))
