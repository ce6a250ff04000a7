"""The entries of a state dict as ``torch.func.functional_call`` looks for them: by path, as tensors of a module."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from tinyq_lightning.errors import ModelError

__all__ = [
    "NO_PACKED_CODES",
    "StateEntries",
    "is_path_walked",
]

NO_PACKED_CODES = (
    "codes of four bits are packed in state dicts alone: give functional_call the model's own tensors, "
    "{**dict(model.named_parameters()), **dict(model.named_buffers())}"
)
"""What is said of ``int4_weights`` that are to stand in for a while."""


def is_path_walked() -> bool:
    """Whether the attribute that the caller is asked for is a step on the path of a tensor, inside of torch.

    ``functional_call`` takes the names of state dicts for paths, and wants a module where a weight is read elsewhere.
    """
    if torch.compiler.is_compiling():  # which knows no frames
        return False
    code = sys._getframe(2).f_code
    return code.co_name == "get_submodule" and code.co_filename.endswith("_named_member_accessor.py")


class StateEntries(nn.Module):
    """Stands for one weight of a layer that holds several: its entries in the state dict, over the layer's buffers.

    Args:
        layer: what holds the buffers.
        names: the buffer of each entry.
    """

    def __init__(self, layer: nn.Module, names: Mapping[str, str]) -> None:
        super().__init__()
        vars(self)["_buffers"] = _Renamed(layer._buffers, names)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("int4"):
            raise ModelError(NO_PACKED_CODES)
        return super().__getattr__(name)


class _Renamed(MutableMapping[str, "Tensor | None"]):
    """Some buffers of a module under other names."""

    def __init__(self, buffers: MutableMapping[str, Tensor | None], names: Mapping[str, str]) -> None:
        self._held, self._names = buffers, names

    def __getitem__(self, name: str) -> Tensor | None:
        return self._held[self._names[name]]

    def __setitem__(self, name: str, tensor: Tensor | None) -> None:
        self._held[self._names[name]] = tensor

    def __delitem__(self, name: str) -> None:
        del self._held[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
