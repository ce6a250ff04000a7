"""What an evaluation changes outside of objects: globals, what functions close over, defaults, caches.

It is not put back, because the user may gather there on purpose what every loop did; but it is told.
"""

from __future__ import annotations

import gc
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from tinyq_lightning.plan import globals_read

__all__ = [
    "Outside",
]

# Items of a container that are looked at, from its end; levels of containers and objects; functions that are followed.
_ITEMS, _DEPTH, _FUNCTIONS = 64, 4, 2000

_LRU_CACHE, _LINK = "_lru_cache_wrapper", "_lru_list_elem"


class Outside:
    """Digests of what functions can change outside of objects, to be compared later.

    Args:
        holders: classes and functions of the user's.
        is_users: whether a class, function or module is the user's own.
        known: ids of objects that are put back, and need not be looked at.
    """

    def __init__(self, holders: Collection[Any], is_users: Callable[[Any], bool], known: Collection[int]) -> None:
        self._is_users, self._known = is_users, known
        self._places: list[tuple[str, Callable[[], Any], int]] = []
        for where, read in self._reached(holders):
            self._places.append((where, read, self._digest(read(), _DEPTH)))

    def changed(self) -> list[str]:
        """Where something is other than it was."""
        now = ((where, self._digest(read(), _DEPTH) != before) for where, read, before in self._places)
        return list(dict.fromkeys(where for where, changed in now if changed))

    def _reached(self, holders: Collection[Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
        pending, seen = deque[Any](holders), set[int]()
        while pending and len(seen) < _FUNCTIONS:
            holder: Any = pending.popleft()
            holder = holder.__func__ if isinstance(holder, MethodType | staticmethod | classmethod) else holder
            if id(holder) in seen:
                continue
            seen.add(id(holder))
            if isinstance(holder, type):
                pending += (*vars(holder).values(), type(holder))
                if id(holder) not in self._known and self._is_users(holder):
                    yield f"an attribute of {holder.__qualname__}", partial(_of_class, holder)
            elif isinstance(holder, property):
                pending += (holder.fget, holder.fset)
            elif type(holder).__name__ == _LRU_CACHE:
                yield f"the cache of {holder.__name__}", partial(_of_cache, holder)
                yield f"the cache of {holder.__name__}", partial(_in_cache, holder)
                pending.append(holder.__wrapped__)
            elif isinstance(holder, FunctionType) and self._is_users(holder):
                for where, read, value in _of_function(holder):
                    yield where, read
                    pending.append(value)

    def _digest(self, value: Any, depth: int) -> int:
        """A number that changes with the value; 0 for what is not looked at."""
        if value is None or isinstance(value, bool | int | float | complex | str | bytes):
            return zlib.crc32(repr(value)[:1000].encode())
        if id(value) in self._known or not depth:
            return 0
        if isinstance(value, Tensor):
            return _of_tensor(value)
        if isinstance(value, np.ndarray):
            return zlib.crc32(repr((value.shape, value.ravel()[:: max(1, value.size // 256)].tolist())).encode())
        parts = self._parts(value)
        return 0 if parts is None else hash((len(parts), *(self._digest(part, depth - 1) for part in parts[-_ITEMS:])))

    def _parts(self, value: Any) -> list[Any] | None:
        """What is looked at of a container, or of an object of the user's or of torchmetrics."""
        if isinstance(value, Mapping):
            return [part for pair in value.items() for part in pair]
        if isinstance(value, list | tuple | deque):
            return list(value)
        if isinstance(value, set | frozenset):
            return [len(value)]
        if isinstance(value, ContextVar):
            return [value.get(None)]
        if isinstance(value, ModuleType):
            plain = (bool, int, float, str, list, dict, set, deque)
            return [each for each in vars(value).values() if type(each) in plain] if self._is_users(value) else None
        if isinstance(value, type | FunctionType) or not (isinstance(value, Metric) or self._is_users(type(value))):
            return None
        return [part for pair in getattr(value, "__dict__", {}).items() for part in pair]


def _of_function(function: FunctionType) -> Iterator[tuple[str, Callable[[], Any], Any]]:
    """Where a function can keep something, how that is read, and what it is now."""
    name, held = function.__qualname__, function.__globals__
    for key, value in globals_read(function):
        yield f"the global {key} of {function.__module__}", lambda key=key: held.get(key), value  # type: ignore[misc]
    for free, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if free != "__class__":
            yield f"{free}, which {name} closes over", lambda cell=cell: _content(cell), _content(cell)  # type: ignore[misc]
    yield f"a default of {name}", lambda: (function.__defaults__, function.__kwdefaults__), None
    yield f"an attribute of {name}", lambda: vars(function), None


def _of_cache(cached: Any) -> tuple[int, int]:
    """What a cache had to compute; of a method, which may have used weights, also what it did not compute anew."""
    info = cached.cache_info()
    return info.misses, info.hits if cached.__wrapped__.__code__.co_varnames[:1] == ("self",) else 0


def _in_cache(cached: Any) -> list[Any]:
    """The results that a cache holds, which may be changed in place; of a bounded one, with their keys."""
    held = [part for each in gc.get_referents(cached) if type(each) is dict for part in each.values()]
    return [part for each in held for part in (gc.get_referents(each) if type(each).__name__ == _LINK else (each,))]


def _of_class(kind: type) -> dict[str, Any]:
    """What a class holds besides what is called on it."""
    return {name: value for name, value in vars(kind).items() if not hasattr(type(value), "__get__")}


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _of_tensor(value: Tensor) -> int:
    if value.is_meta or value.layout != torch.strided:
        return 0
    if value.is_inference():
        return zlib.crc32(repr(value.flatten()[:256].tolist()).encode())
    return hash((value._version, value.data_ptr(), value.shape))
