"""The answer of a command, and what several commands need."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm import tqdm

from tinyq_lightning.errors import ModelError, TinyQError, quoted
from tinyq_lightning.file import Archive, Folder, as_factory
from tinyq_lightning.plan import WithValues
from tinyq_lightning.table import format_bytes

__all__ = [
    "Answer",
    "file_size",
    "model_class",
    "note",
    "progress",
    "why_failed",
]


@dataclass(frozen=True)
class Answer:
    """What a command prints.

    Attributes:
        text: for people.
        data: for ``--json``.
        good: False if a check failed; the exit code is 1 then.
    """

    text: str
    data: dict[str, Any]
    good: bool = True


def model_class(path: str | None, source: Archive | Folder, trust: bool) -> Any:
    """The class or function at ``path``; if that is None and the file is trusted, what LightningCLI noted in the file.

    Raises:
        ModelError: there is no such class, or the file names it and is not trusted.
    """
    stored = source.content.get("hyper_parameters") if isinstance(source.content, dict) else None
    noted = stored.get("_class_path") if isinstance(stored, dict) else None
    if path is None and noted is not None and not trust:
        raise ModelError(
            f"{source.path} says that it was made from {noted}: give --model {noted}, or --trust if you trust the file"
        )
    path = path or noted
    if not isinstance(path, str):
        raise ModelError(f"{source.path} does not say which class it was made from: give --model package.module:Class")
    return as_factory(path)


def file_size(path: str) -> str:
    """The size of a local file or folder for people; empty for any other."""
    if os.path.isdir(path):
        return format_bytes(sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file()))
    return format_bytes(os.path.getsize(path)) if os.path.isfile(path) else ""


def note(text: str) -> None:
    """A line on stderr, above a bar if there is one."""
    tqdm.write(text, file=sys.stderr)


def why_failed(path: str, error: Exception) -> str:
    """What went wrong with one of several files, by its name; of an error that is not ours, where in the code too."""
    text = str(error)
    if not isinstance(error, TinyQError):  # the user's class can raise anything
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{quoted(error)} ({where.filename}:{where.lineno})"
    return text if path in text else f"{path}: {text}"


@contextmanager
def progress(title: str) -> Iterator[WithValues]:
    """A bar on a terminal that moves with each layer; nothing elsewhere."""
    with tqdm(desc=title, unit=" layers", disable=None, leave=False) as bar:

        @contextmanager
        def around(layer: nn.Module) -> Iterator[None]:
            yield
            bar.update()

        yield around
