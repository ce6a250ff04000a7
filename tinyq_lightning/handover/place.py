"""Files are written into a temporary folder beside their place, and moved there once they are known to be right."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
from fsspec.implementations.local import LocalFileSystem

from tinyq_lightning.errors import ExportError
from tinyq_lightning.file import refuse_existing, temporary_folder, why_not_writable

__all__ = [
    "check_place",
    "move_into_place",
    "workshop",
]


def check_place(path: str) -> None:
    """Check that there is a file system for a path, and that its folder, which may be missing, takes files.

    Raises:
        ExportError: there is none of that name, its library is not installed, or no file can be saved there.
    """
    try:
        fs, location = fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise ExportError(f"{path}: the file cannot be written there: {error}") from error
    if why_not := why_not_writable(fs.unstrip_protocol(fs._parent(location))):
        raise ExportError(f"{path}: the file cannot be written there: {why_not}")


@contextmanager
def workshop(path: str) -> Iterator[str]:
    """Context manager with the path to write to: of the same name, in a temporary folder, which is then removed.

    Args:
        path: the final path, local or a URL that fsspec can open. The folder lies beside a local one, or in the first
            folder above it that is there.
    """
    fs, location = fsspec.core.url_to_fs(path)
    beside = _folder_there(os.path.dirname(os.path.abspath(location))) if isinstance(fs, LocalFileSystem) else None
    with temporary_folder(beside) as folder:
        yield os.path.join(folder, os.path.basename(location.rstrip("/")))


def _folder_there(folder: str) -> str:
    """The folder, or the first above it that exists."""
    while not os.path.isdir(folder) and os.path.dirname(folder) != folder:
        folder = os.path.dirname(folder)
    return folder


def move_into_place(written: str, path: str, overwrite: bool) -> tuple[str, ...]:
    """Move all files that were written to where they belong, the main one last.

    A file that is replaced is removed first if there are several, so that at no time files of two exports lie together.

    Args:
        written: the main file in the temporary folder, or a folder.
        path: its final path.
        overwrite: whether files that are there may be replaced.

    Returns:
        The final paths, the main file first.

    Raises:
        ExportError: a file is in the way, or could not be written.
    """
    source = os.path.dirname(written)
    fs, location = fsspec.core.url_to_fs(path)
    folder, named = location.rstrip("/").rpartition("/")[0], path.rstrip("/")
    prefix = named[: len(named) - len(os.path.basename(written))]
    names = sorted(
        os.path.relpath(os.path.join(above, name), source) for above, _, files in os.walk(source) for name in files
    )
    main = os.path.basename(written)
    others = [name for name in names if name != main]
    for name in others:
        refuse_existing(f"{prefix}{name}", overwrite, ExportError)
    targets = {name: os.path.join(folder, name) if folder else name for name in names}
    try:
        if others and main in targets and fs.exists(targets[main]):
            fs.rm(targets[main])
        for name in (*others, *([main] if main in names else [])):
            _move(fs, os.path.join(source, name), targets[name])
    except OSError as error:
        raise ExportError(f"{path}: the file could not be written: {error}") from error
    first = [main] if main in names else []
    return tuple(f"{prefix}{name}" for name in (*first, *others))


def _move(fs: fsspec.AbstractFileSystem, written: str, target: str) -> None:
    if not isinstance(fs, LocalFileSystem):
        fs.makedirs(fs._parent(target), exist_ok=True)
        fs.put_file(written, target)
        return
    os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
    descriptor = os.open(written, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(written, target)
