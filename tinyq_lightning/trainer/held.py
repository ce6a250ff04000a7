"""State that hangs on threads, contexts, queues and tables, and on what a method belongs to."""

from __future__ import annotations

import functools
import queue
import threading
import types
import weakref
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from typing import Any, cast

import numpy as np

from tinyq_lightning.trainer.values import State, watched

__all__ = [
    "HELD",
    "is_database",
    "is_frame",
    "of_database",
    "of_frame",
]

_MISSING = object()

# Larger tables are not copied.
_MAX_FRAME_BYTES = 2**28


def _of_builtin(value: types.BuiltinFunctionType) -> State:
    """Of a method such as ``[].append``, the object that it belongs to."""
    return State(_nothing, [("", value.__self__)])


def _of_context_variable(value: ContextVar[Any]) -> State:
    try:
        content = value.get()  # or its default
    except LookupError:  # only who has set it first can take that back
        return watched(lambda: value.get(_MISSING))
    return State(lambda: value.get(_MISSING) is content or value.set(content), [("", content)])


def _of_queue(value: queue.Queue[Any]) -> State:
    unfinished = value.unfinished_tasks
    return State(lambda: setattr(value, "unfinished_tasks", unfinished), [(".queue", value.queue)])


def _of_weak(value: Any) -> State:
    return State(_nothing, [("", value.data)])


HELD: dict[type | tuple[type, ...], Callable[[Any], State]] = {
    types.BuiltinFunctionType: _of_builtin,
    ContextVar: _of_context_variable,
    queue.Queue: _of_queue,
    queue.SimpleQueue: lambda value: watched(value.qsize),
    memoryview: lambda value: State(_nothing, [("", value.obj)]),
    threading.local: lambda value: State(_nothing, [("", vars(value))]),
    (weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet): _of_weak,
}
"""What reads the state of an object, by its type."""


def is_database(value: object) -> bool:
    """Whether it is a connection to SQLite, which not every Python has."""
    return _is_connection(cast(Hashable, type(value)))


@functools.lru_cache(maxsize=4096)
def _is_connection(kind: Hashable) -> bool:
    """By the class alone: the attributes of others' objects are not asked for."""
    bases = cast(type, kind).__mro__
    return any(base.__name__ == "Connection" and base.__module__ == "sqlite3" for base in bases)


def of_database(value: Any) -> State:
    """How many rows were changed by it."""

    def changes() -> object:
        try:
            return value.total_changes
        except Exception:  # it is closed, or of another thread
            return None

    return watched(changes)


def is_frame(value: object) -> bool:
    """Whether it is a table or a column of pandas, which need not be installed."""
    return str(type(value).__module__).partition(".")[0] == "pandas" and hasattr(value, "_mgr")


def of_frame(value: Any) -> State:
    """The content of a table of pandas; of a very large one, whether it has been exchanged."""
    if int(np.sum(value.memory_usage(index=False))) > _MAX_FRAME_BYTES:
        return watched(lambda: value._mgr)
    copy = value.copy()
    return State(lambda: value._update_inplace(copy.copy()))


def _nothing() -> None:
    """There is nothing to put back: what hangs on the object is."""
