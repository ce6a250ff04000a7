"""The last weights that were dequantized, so that reading one again within a forward pass costs nothing."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tinyq_lightning.kernels import CodeHolder, TensorSnapshot, dequantize, outside_modes
from tinyq_lightning.layers.read_only import ReadOnlyTensor

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
        codes: ``[rows, columns]`` int8, or more dimensions; or the form that holds them.
        scales: ``[rows]`` float32.
        dtype: of the weight.
        groups: of a transposed convolution; 0 for all others.
        layout: of the weight in memory.
    """

    codes: Tensor | CodeHolder
    scales: Tensor
    dtype: torch.dtype
    groups: int = 0
    layout: torch.memory_format = torch.contiguous_format

    def values(self) -> Tensor:
        """Like the codes, of ``dtype`` and ``layout``."""
        codes = self.codes if isinstance(self.codes, Tensor) else self.codes.codes()
        return dequantize(codes, self.scales, self.dtype, self.groups).contiguous(memory_format=self.layout)


class Dequantized:
    """The float weight of one layer, kept until codes or scales change or other weights are read."""

    def __init__(self) -> None:
        self._kept: ReadOnlyTensor | None = None
        self._is_current: Callable[[WeightSource], bool] = lambda source: False

    def weight(self, source: WeightSource, shape: torch.Size) -> ReadOnlyTensor:
        """The weight of ``source``: that of the last call if it has its values and nothing has changed since."""
        with _lock:
            kept = self._kept
            if kept is not None and self._is_current(source):
                _recent.move_to_end(id(self))
                return kept
        make = partial(_values, source, weakref.ref(self))
        with torch.inference_mode(False):  # what is made inside cannot be part of a graph with gradients
            return ReadOnlyTensor(make, shape, source.dtype, source.scales.device, source.layout)

    def keep(self, weight: ReadOnlyTensor, values: Tensor, source: WeightSource) -> None:
        """Keep a weight that has its values now."""
        if values.nbytes > _MOST_BYTES:
            return
        with _lock:
            self._kept, self._is_current = weight, _snapshot(source)
            for key in [key for key, (each, _) in _recent.items() if each() is None]:
                del _recent[key]
            _recent[id(self)] = weakref.ref(self), values.nbytes
            _recent.move_to_end(id(self))
            while sum(size for _, size in _recent.values()) > _MOST_BYTES:
                _, (oldest, _) = _recent.popitem(last=False)
                if (other := oldest()) is not None:
                    other._kept = None


def _values(source: WeightSource, owner: weakref.ref[Dequantized], weight: ReadOnlyTensor) -> Tensor:
    with outside_modes():
        values = source.values()
    if (dequantized := owner()) is not None:
        dequantized.keep(weight, values, source)
    return values


def _snapshot(source: WeightSource) -> Callable[[WeightSource], bool]:
    """A function that returns True if a source is this one, with nothing written to it since."""
    scales, dtype, layout = TensorSnapshot(source.scales), source.dtype, source.layout
    plain = TensorSnapshot(source.codes) if isinstance(source.codes, Tensor) else None
    holder = weakref.ref(source.codes) if isinstance(source.codes, CodeHolder) else None

    def is_current(other: WeightSource) -> bool:
        if (other.dtype, other.layout) != (dtype, layout) or not scales.matches(other.scales):
            return False
        if isinstance(other.codes, Tensor):
            return plain is not None and plain.matches(other.codes)
        return holder is not None and other.codes is holder() and other.codes.is_current(None, other.scales)

    return is_current


_lock = threading.RLock()


# From the one that was read the longest ago.
_recent: OrderedDict[int, tuple[weakref.ref[Dequantized], int]] = OrderedDict()
