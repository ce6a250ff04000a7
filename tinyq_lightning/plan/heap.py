"""Freed memory given back to the system, so that a model that got smaller is seen to be."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

__all__ = [
    "return_freed_memory",
]


def return_freed_memory() -> None:
    """Have the C library give freed memory back to the system, where it is one that would keep it.

    glibc keeps what was freed between two blocks in use, for every block of less than 32 MiB once one of
    that size has been freed: most weights. Its ``malloc_trim`` (see its manual page) releases whole pages
    of it. Elsewhere this does nothing.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; Windows takes no None
        return None
