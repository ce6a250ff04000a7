"""Typed values out of plain data, with errors that say where the value was written and what is near it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from tinyq_lightning.errors import SpecError
from tinyq_lightning.spec.places import Origin

__all__ = [
    "Reader",
    "nearest",
    "shown",
]


def nearest(word: str, known: Iterable[str], count: int = 1) -> str:
    """``Did you mean 'x'?``, or nothing where no known word is near."""
    close = difflib.get_close_matches(word, dict.fromkeys(known), n=count, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


class Reader:
    """Takes typed values out of plain data; every error, a ``SpecError``, says where the value was written.

    Args:
        origin: the places of the keys.
        path: of the value that is read.
    """

    def __init__(self, origin: Origin, path: tuple[str | int, ...] = ()) -> None:
        self.origin, self.path = origin, path

    def fail(self, message: str, *keys: str | int) -> NoReturn:
        """Refuse, with the place of ``keys`` below this value."""
        raise SpecError(f"{self.origin.where(*self.path, *keys)}: {message}")

    def below(self, *keys: str | int) -> Reader:
        """A reader of the value at ``keys``."""
        return Reader(self.origin, (*self.path, *keys))

    def mapping(self, value: Any, known: Sequence[str], required: Sequence[str] = ()) -> dict[str, Any]:
        """A mapping with none but the ``known`` keys."""
        if not isinstance(value, dict):
            self.fail(f"this must be a mapping with the keys {', '.join(known)}, not {shown(value)}")
        for key in value:
            if key not in known:
                self.fail(f"unknown key {key!r}.{nearest(str(key), known)} Keys are: {', '.join(known)}", key)
        for key in required:
            if value.get(key) is None:
                self.fail(f"the key {key!r} is missing")
        return value

    def choice(self, value: Any, known: Sequence[str], what: str, key: str | int | None = None) -> Any:
        """One of the ``known`` values.

        Args:
            value: at ``key``.
            known: what it may be.
            what: what such a value is called.
            key: ``what`` if None.
        """
        if value not in known:
            hint = nearest(value, known) if isinstance(value, str) else ""
            place = what if key is None else key
            self.fail(f"{shown(value)} is not a {what}.{hint} Choose from: {', '.join(known)}", place)
        return value

    def flag(self, value: Any, key: str) -> bool:
        """True or false."""
        if not isinstance(value, bool):
            self.fail(f"{key} must be true or false, not {shown(value)}", key)
        return value

    def text(self, value: Any, key: str) -> str | None:
        """Text or None."""
        if value is not None and (not isinstance(value, str) or not value):
            self.fail(f"{key} must be text, not {shown(value)}", key)
        return value

    def pattern(self, value: Any, key: str | int) -> str:
        """A pattern of layer names."""
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # the leaf names of nn.Sequential, which YAML reads as numbers
        if not isinstance(value, str) or not value:
            self.fail(f"a pattern must be text, not {shown(value)}: put it in quotes", key)
        if value.startswith("re:"):
            try:
                re.compile(value[3:])
            except re.error as error:
                self.fail(f"pattern {value!r} is not a regular expression: {error}", key)
        return value

    def items(self, value: Any, key: str) -> list[Any]:
        """A list; None is an empty one."""
        if value is None:
            return []
        if not isinstance(value, list | tuple):
            cure = f": write [{value}]" if isinstance(value, str) else ""
            self.fail(f"{key} must be a list, not {shown(value)}{cure}", key)
        return list(value)


def shown(value: Any) -> str:
    """A value as an error quotes it, with its type where that may be what is wrong."""
    return f"{type(value).__name__} {value!r}" if not isinstance(value, str) else repr(value)
