"""Buffers that several layers share, and still do once each layer was moved to another device."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = [
    "follow",
]

# The tensor that a buffer was moved to, by the buffer: layers that share it and are moved later take the same one.
_moved: MutableMapping[Tensor, weakref.ref[Tensor]] = WeakTensorKeyDictionary()


def follow(before: Tensor, after: Tensor) -> Tensor:
    """Return ``after`` in the dtype of ``before``, or the tensor that another layer's ``before`` was moved to."""
    if after.dtype != before.dtype:
        after = before.to(after.device)
    if after is before:
        return after
    first = _moved[before]() if before in _moved else None
    if first is not None and first.device == after.device:
        return first
    _moved[before] = weakref.ref(after)
    return after
