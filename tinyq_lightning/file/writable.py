"""Whether a folder, local or remote, takes files: known before a long training, not after it."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress

import fsspec
from fsspec import AbstractFileSystem

__all__ = [
    "why_not_writable",
]


def why_not_writable(folder: str | os.PathLike[str]) -> str | None:
    """Why no file can be written to a folder, or None: writes a small file there, renames and removes it.

    Folders that are missing are made for it and removed again.

    Args:
        folder: local, or a URL that fsspec knows.
    """
    try:
        fs, location = fsspec.core.url_to_fs(os.fspath(folder) or ".")
        missing = _missing_folders(fs, location)
        probe = f"{location}/.{uuid.uuid4().hex[:12]}.tinyq-tmp"
        try:
            fs.makedirs(location, exist_ok=True)
            with fs.open(probe, "wb") as file:
                file.write(b"\0")
            with suppress(FileNotFoundError):  # another process took it for a leftover
                _rename(fs, probe, f"{location}/.{uuid.uuid4().hex[:12]}.tinyq-tmp")
        finally:
            for made in missing:
                with suppress(Exception):  # many remote file systems have no folders
                    fs.rmdir(made)
    except Exception as error:  # each file system has errors of its own
        return f"{type(error).__name__}: {error}".removesuffix(": ")
    return None


def _rename(fs: AbstractFileSystem, probe: str, other: str) -> None:
    """Rename a file, as the end of a save does, and remove it."""
    try:
        fs.mv(probe, other)
    except Exception:
        fs.rm(probe)
        raise
    fs.rm(other)


def _missing_folders(fs: AbstractFileSystem, location: str) -> list[str]:
    """The folder and its parents that do not exist, the deepest first."""
    missing: list[str] = []
    while location and not fs.exists(location) and location not in missing:
        missing.append(location)
        location = fs._parent(location)
    return missing
