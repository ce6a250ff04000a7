"""Whether a folder, local or remote, takes files: known before a long training, not after it."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress

import fsspec
from fsspec import AbstractFileSystem

from tinyq_lightning.errors import CheckpointError, quoted
from tinyq_lightning.file.durable import replace_file

__all__ = [
    "why_not_writable",
]


def why_not_writable(folder: str | os.PathLike[str]) -> str | None:
    """Why no file can be written to a folder, or None: saves a small file there as all are saved, and removes it.

    Folders that are missing are made for it and removed again.

    Args:
        folder: local, or a URL that fsspec knows.
    """
    try:
        fs, location = fsspec.core.url_to_fs(os.fspath(folder) or ".")
        missing = _missing_folders(fs, location)
        name = f".{uuid.uuid4().hex[:12]}.tinyq-tmp"
        try:
            replace_file(f"{os.fspath(folder) or '.'}/{name}", lambda file: file.write(b"\0"))
            with suppress(FileNotFoundError):  # another process took it for a leftover
                fs.rm(f"{location}/{name}")
        finally:
            for made in missing:
                with suppress(Exception):  # many remote file systems have no folders
                    fs.rmdir(made)
    except Exception as error:  # each file system has errors of its own
        reason = error.__cause__ or error if isinstance(error, CheckpointError) else error
        return quoted(reason)
    return None


def _missing_folders(fs: AbstractFileSystem, location: str) -> list[str]:
    """The folder and its parents that do not exist, the deepest first."""
    missing: list[str] = []
    while location and not fs.exists(location) and location not in missing:
        missing.append(location)
        location = fs._parent(location)
    return missing
