"""Which arguments a class or function still needs, for errors."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Collection, Iterator
from typing import Any

from tinyq_lightning.file.factory import parameters_of

__all__ = [
    "still_needed",
]


def still_needed(factory: Any, given: Collection[str]) -> str:
    """The arguments without a default that are not given, as a call would have them: ``config=..., width=...``.

    Args:
        factory: a class, or a function that makes a module.
        given: names of arguments.
    """
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = parameters_of(factory)
    needed = [name for name, each in taken.items() if each.default is each.empty and each.kind in named]
    classes = factory.__mro__ if isinstance(factory, type) else ()
    inits = [vars(cls)["__init__"] for cls in classes if "__init__" in vars(cls)]
    for function in inits or [factory]:
        if (rest := _name_of_rest(function)) is None:
            break  # what it takes is named, and the classes below it get no other names of the caller
        needed += _read_from(function, rest)
    missing = [name for name in dict.fromkeys(needed) if name not in given]
    return ", ".join(f"{name}=..." for name in missing or ["argument"])


def _name_of_rest(function: Any) -> str | None:
    """What a function calls its ``**kwargs``; None if it takes none."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # it is written in C
        return None
    return next((name for name, each in parameters.items() if each.kind is inspect.Parameter.VAR_KEYWORD), None)


def _read_from(function: Any, rest: str) -> Iterator[str]:
    """The names that a function reads from its ``**kwargs`` as ``kwargs["name"]``, and not only if they are there."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return
    tests = [node.test for node in ast.walk(tree) if isinstance(node, ast.If | ast.IfExp)]
    optional = {each.value for test in tests for each in ast.walk(test) if isinstance(each, ast.Constant)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == rest:
            key, reads = node.slice, isinstance(node.ctx, ast.Load)
            if reads and isinstance(key, ast.Constant) and isinstance(key.value, str) and key.value not in optional:
                yield key.value
