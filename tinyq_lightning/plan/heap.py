"""Returns freed memory to the operating system, so that the process gets smaller when the model does."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

__all__ = [
    "return_freed_memory",
]


def return_freed_memory() -> None:
    """Have the C library return freed memory to the operating system.

    After freeing one large block, glibc raises its mmap threshold to 32 MiB and keeps smaller freed blocks, which
    most weights are; its ``malloc_trim`` (see the manual page) returns them. With another C library this does nothing.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; Windows takes no None
        return None
