"""Refuses keyword arguments that a function does not take, with the name that was meant."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from tinyq_lightning.spec.reader import nearest
from tinyq_lightning.spec.spec import SPEC_KEYS

__all__ = [
    "names_near_keywords",
]

F = TypeVar("F", bound=Callable[..., Any])


def names_near_keywords(function: F) -> F:
    """Decorator: the TypeError about an unknown keyword names what is near; Python's own does from 3.13 on.

    A key of the spec that is no argument is said to go into the spec.
    """
    known = [name for name in inspect.signature(function).parameters if name != "self"]
    called = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in known:
                hint = nearest(name, known)
                if name in SPEC_KEYS and "spec" in known:
                    hint = f" It is a key of the spec, which is the first argument: {called}({{{name!r}: ...}})."
                raise TypeError(f"{called} has no argument {name!r}.{hint} Arguments are: {', '.join(known)}")
        return function(*args, **kwargs)

    return cast(F, checked)
