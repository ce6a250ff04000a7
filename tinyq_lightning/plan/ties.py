"""Which parameters and buffers of a model share memory: what ties are known by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tinyq_lightning.layers import (
    Int8Weight,
    sources_of,
)
from tinyq_lightning.plan.wrappers import users_path

__all__ = [
    "MemoryMap",
    "weights_of",
]


class MemoryMap:
    """Which parameters and buffers of a model have which memory; int8 weights that are packed are unpacked.

    Args:
        model: where to look.
    """

    def __init__(self, model: nn.Module) -> None:
        self._by_storage: dict[int, list[tuple[nn.Module, str, str, Tensor]]] = defaultdict(list)
        for path, module in model.named_modules():
            path = users_path(path)
            if isinstance(module, Int8Weight):
                module.unpack()
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if _has_memory(tensor):
                    entry = (module, name, f"{path}.{name}".removeprefix("."), tensor)
                    self._by_storage[tensor.untyped_storage()._cdata].append(entry)

    def holders(self, tensor: Tensor) -> Iterator[tuple[nn.Module, str, str, bool]]:
        """Each (module, attribute, dotted path) with some of its memory, and whether it is the very same elements."""
        if _has_memory(tensor):
            start, end = _extent(tensor)
            for module, name, path, other in self._by_storage[tensor.untyped_storage()._cdata]:
                first, last = _extent(other)
                if first < end and start < last:
                    yield module, name, path, _layout(other) == _layout(tensor)


def _has_memory(tensor: Tensor | None) -> TypeGuard[Tensor]:
    if tensor is None or type(tensor) not in (Tensor, nn.Parameter):
        return False
    return tensor.layout == torch.strided and tensor.numel() > 0


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte in its storage, and the one after the last."""
    start = tensor.storage_offset()
    last = start + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(start) * tensor.element_size(), int(last + 1) * tensor.element_size()


def weights_of(holder: nn.Module, name: str) -> Iterator[tuple[Tensor, nn.Module]]:
    """The tensors that a weight is, or is computed from, each with the module that registers it."""
    if parametrize.is_parametrized(holder, name):
        for module in holder.parametrizations[name].modules():  # type: ignore[index, union-attr]
            yield from ((tensor, module) for tensor in module._parameters.values() if tensor is not None)
    else:
        for each in sources_of(holder, name) or (name,):
            tensor = holder._parameters.get(each, holder._buffers.get(each))
            if tensor is not None:
                yield tensor, holder
