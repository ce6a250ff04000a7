"""Files written whole or not at all: to a temporary name beside the target, flushed to the disk, renamed."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from tinyq_lightning.errors import CheckpointError

__all__ = [
    "replace_file",
]

try:
    import fcntl
except ImportError:  # Windows, which refuses to remove a file that is open instead
    fcntl = None  # type: ignore[assignment]


_ENDING = ".tinyq-tmp"


def replace_file(path: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> None:
    """Put what ``write`` writes at ``path``: killed at any moment, there is the former file or the new one.

    A killed process can leave a hidden file that ends in ``.tinyq-tmp``; the next call for the same folder
    removes it, unless the process that writes it is alive.

    Args:
        path: local, or a URL that fsspec knows. Folders are made.
        write: fills the open file.

    Raises:
        CheckpointError: it could not be written; what was there before is untouched.
    """
    fs, location = fsspec.core.url_to_fs(os.fspath(path))
    try:
        if isinstance(fs, LocalFileSystem):
            _replace_local(os.path.realpath(location), write)
        else:
            _replace_remote(fs, location, write)
    except (OSError, RuntimeError) as error:  # torch's writer turns some of the first into the second
        raise CheckpointError(f"{path}: the file could not be written: {error}") from error


def _replace_remote(fs: AbstractFileSystem, location: str, write: Callable[[IO[bytes]], object]) -> None:
    folder = fs._parent(location)
    temporary = f"{folder}/{_temporary_name()}"
    fs.makedirs(folder, exist_ok=True)
    try:
        with fs.open(temporary, "wb") as file:
            write(file)
        fs.mv(temporary, location)
    finally:
        if fs.exists(temporary):
            fs.rm(temporary)


def _replace_local(target: str, write: Callable[[IO[bytes]], object]) -> None:
    folder = os.path.dirname(target)
    os.makedirs(folder, exist_ok=True)
    _remove_leftovers(folder)
    with _locked_temporary(folder) as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
        if fcntl is None:
            file.close()  # Windows renames no open file
        os.replace(file.name, target)
    with suppress(OSError):  # the rename itself, where folders can be flushed
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _locked_temporary(folder: str) -> Iterator[IO[bytes]]:
    """A new file, locked while its process lives, and gone after the block unless it was renamed."""
    while True:
        path = os.path.join(folder, _temporary_name())
        with open(path, "xb") as file:
            _lock(file)
            if fcntl is not None and os.fstat(file.fileno()).st_nlink == 0:
                continue  # taken for a leftover before it was locked
            try:
                yield file
            finally:
                with suppress(OSError):  # a full disk fails here once more
                    file.close()
                with suppress(FileNotFoundError):
                    os.remove(path)
            return


def _remove_leftovers(folder: str) -> None:
    for entry in os.scandir(folder):
        if entry.name.startswith(".") and entry.name.endswith(_ENDING):
            with suppress(OSError), open(entry.path, "rb") as file:
                _lock(file)
                os.remove(entry.path)


def _lock(file: IO[bytes]) -> None:
    """Take the file's lock, which the system gives back when the process ends in whatever way."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _temporary_name() -> str:
    return f".{uuid.uuid4().hex[:12]}{_ENDING}"
