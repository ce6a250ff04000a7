"""The last weights that were dequantized, so that reading one again within a forward pass costs nothing."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyq_lightning.kernels import CodeHolder, TensorSnapshot, dequantize, outside_modes

__all__ = [
    "Dequantized",
    "WeightSource",
]

# All weights that are kept take at most this many bytes, in the whole process.
_MOST_BYTES = 32 * 2**20


@dataclass(frozen=True)
class WeightSource:
    """What a weight is computed from.

    Attributes:
        codes: ``[rows, columns]`` int8, or the form that holds them.
        scales: ``[rows]`` float32.
        dtype: of the weight.
    """

    codes: Tensor | CodeHolder
    scales: Tensor
    dtype: torch.dtype

    def values(self) -> Tensor:
        """``[rows, columns]`` of ``dtype``."""
        codes = self.codes if isinstance(self.codes, Tensor) else self.codes.codes()
        return dequantize(codes, self.scales, self.dtype)


class Dequantized:
    """The float weight of one layer, kept until codes or scales change or other weights are read."""

    def __init__(self) -> None:
        self._values: Tensor | None = None
        self._version = 0
        self._is_current: Callable[[WeightSource], bool] = lambda source: False

    def get(self, source: WeightSource) -> Tensor:
        """The weight of ``source``: that of the last call if nothing has changed since."""
        with _lock:
            values = self._values
            # Views of a weight are plain tensors: if somebody has written to one, the weight is computed anew.
            if values is None or values._version != self._version or not self._is_current(source):
                with outside_modes():
                    values = source.values()
                self._keep(values, source)
            elif id(self) in _recent:
                _recent.move_to_end(id(self))
            return values

    def clear(self) -> None:
        """Let go of the weight."""
        with _lock:
            self._values = None
            _recent.pop(id(self), None)

    def _keep(self, values: Tensor, source: WeightSource) -> None:
        self.clear()
        if values.nbytes > _MOST_BYTES:
            return
        self._values, self._version, self._is_current = values, values._version, _snapshot(source)
        _recent[id(self)] = weakref.ref(self)
        for key in [key for key, each in _recent.items() if each() is None]:
            del _recent[key]
        while sum(_bytes(each()) for each in _recent.values()) > _MOST_BYTES:
            _, oldest = _recent.popitem(last=False)
            if (other := oldest()) is not None:
                other._values = None


def _bytes(kept: Dequantized | None) -> int:
    return 0 if kept is None or kept._values is None else kept._values.nbytes


def _snapshot(source: WeightSource) -> Callable[[WeightSource], bool]:
    """A function that returns True if a source is this one, with nothing written to it since."""
    scales, dtype = TensorSnapshot(source.scales), source.dtype
    plain = TensorSnapshot(source.codes) if isinstance(source.codes, Tensor) else None
    holder = weakref.ref(source.codes) if isinstance(source.codes, CodeHolder) else None

    def is_current(other: WeightSource) -> bool:
        if other.dtype != dtype or not scales.matches(other.scales):
            return False
        if isinstance(other.codes, Tensor):
            return plain is not None and plain.matches(other.codes)
        return holder is not None and other.codes is holder() and other.codes.is_current(None, other.scales)

    return is_current


_lock = threading.RLock()


# From the one that was read the longest ago.
_recent: OrderedDict[int, weakref.ref[Dequantized]] = OrderedDict()
