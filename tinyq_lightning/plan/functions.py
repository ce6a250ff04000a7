"""Which global variables a function reads, with what is written inside of it."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

__all__ = [
    "globals_read",
]


def globals_read(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Name and value of each global variable that the function's code names, builtins left out."""
    held = function.__globals__
    yield from ((name, held[name]) for name in _names(function.__code__) if name in held)


@lru_cache(maxsize=16384)
def _names(code: CodeType) -> tuple[str, ...]:
    names = {each.argval for each in dis.get_instructions(code) if each.opname in ("LOAD_GLOBAL", "STORE_GLOBAL")}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names.update(_names(constant))
    return tuple(sorted(names))
