"""Writes files so that they are complete or absent: to a temporary name, flushed to the disk, then renamed."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import IO, Any, cast

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from tinyq_lightning.errors import CheckpointError

__all__ = [
    "replace_file",
    "temporary_folder",
]

try:
    import fcntl
except ImportError:  # Windows; it refuses to remove an open file, so a file being written is safe there
    fcntl = None  # type: ignore[assignment]


_ENDING = ".tinyq-tmp"
_ABANDONED_SECONDS = 24 * 3600
"""A temporary file of another machine counts as left behind if it was not written to for this long."""


def replace_file(path: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> None:
    """Replace the file at ``path`` by what ``write`` writes. After a kill at any moment it is the old or the new one.

    A killed process can leave a hidden file that ends in ``.tinyq-tmp``. The next call for the same folder removes
    it, unless the process that writes it is alive.

    Args:
        path: a local path or a URL that fsspec can open. Missing folders are made.
        write: fills the open file.

    Raises:
        CheckpointError: the file could not be written; what was there before is unchanged.
    """
    fs, location = fsspec.core.url_to_fs(os.fspath(path))
    try:
        if isinstance(fs, LocalFileSystem):
            _replace_local(os.path.realpath(location), write)
        else:
            _replace_remote(fs, location, write)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: the file could not be written: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What hindered a file, without the temporary name that it was written to."""
    if isinstance(error, OSError) and error.strerror and _is_temporary(os.path.basename(str(error.filename))):
        return f"{os.path.dirname(error.filename)} takes no file: {error.strerror}"
    return str(error)


@contextmanager
def temporary_folder(beside: str | None = None) -> Iterator[str]:
    """Context manager with a new folder that is removed after it.

    One that a killed process has left beside it is removed when the next is made.

    Args:
        beside: the folder that it is made in, so that files can be renamed to there; None for that of the system.

    Raises:
        CheckpointError: it could not be made.
    """
    if beside is None:
        with tempfile.TemporaryDirectory(suffix=_ENDING) as folder:
            yield folder
        return
    folder = os.path.join(beside, _temporary_name())
    try:
        os.makedirs(folder)
    except OSError as error:
        raise CheckpointError(f"{beside}: no file could be written there: {error}") from error
    _remove_left_folders(beside)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_left_folders(beside: str) -> None:
    with suppress(OSError), os.scandir(beside) as entries:
        for entry in entries:
            if _is_temporary(entry.name) and entry.is_dir(follow_symlinks=False):
                with suppress(OSError):
                    if _is_abandoned(entry.name, entry.stat().st_mtime):
                        shutil.rmtree(entry.path, ignore_errors=True)


def _replace_remote(fs: AbstractFileSystem, location: str, write: Callable[[IO[bytes]], object]) -> None:
    folder = fs._parent(location)
    temporary = f"{folder}/{_temporary_name()}"
    fs.makedirs(folder, exist_ok=True)
    _remove_remote_leftovers(fs, folder)
    try:
        with fs.open(temporary, "wb") as file:
            write(file)
        fs.mv(temporary, location)
    finally:
        if fs.exists(temporary):
            fs.rm(temporary)


def _remove_remote_leftovers(fs: AbstractFileSystem, folder: str) -> None:
    with suppress(Exception):  # file systems raise errors of their own, and none of them may fail the save
        for path in fs.ls(folder, detail=False):
            name = path.rpartition("/")[2]
            if _is_temporary(name):
                modified = fs.modified(path)
                if _is_abandoned(name, modified.timestamp() if isinstance(modified, datetime) else float(modified)):
                    fs.rm(path)


def _replace_local(target: str, write: Callable[[IO[bytes]], object]) -> None:
    folder = os.path.dirname(target)
    os.makedirs(folder, exist_ok=True)
    _remove_leftovers(folder)
    with _locked_temporary(folder) as file:
        _write_all(file, write)
        file.flush()
        os.fsync(file.fileno())
        if fcntl is None:
            file.close()  # Windows cannot rename an open file
        os.replace(file.name, target)
    with suppress(OSError):  # makes the rename durable; some systems cannot open or flush a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_all(file: IO[bytes], write: Callable[[IO[bytes]], object]) -> None:
    """Have a file written. Torch's writer turns an OSError, of a full disk say, into a text about its own position."""
    watched = _Watched(file)
    try:
        write(cast("IO[bytes]", watched))
    except RuntimeError as error:
        if watched.failure is not None:
            raise watched.failure from error
        raise


class _Watched:
    """An open file that keeps the error of a write."""

    failure: OSError | None = None

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def _locked_temporary(folder: str) -> Iterator[IO[bytes]]:
    """A new file. It is locked while this process lives and removed after the block unless it was renamed."""
    while True:
        path = os.path.join(folder, _temporary_name())
        with open(path, "xb") as file:
            try:
                _lock(file)
            except BlockingIOError:
                continue  # another process is just removing it as a leftover
            if fcntl is not None and os.fstat(file.fileno()).st_nlink == 0:
                continue  # another process removed it as a leftover before it was locked
            try:
                yield file
            finally:
                with suppress(OSError):  # on a full disk closing fails again
                    file.close()
                with suppress(FileNotFoundError):
                    os.remove(path)
            return


def _remove_leftovers(folder: str) -> None:
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _is_temporary(entry.name):
                with suppress(OSError):
                    if fcntl is None:
                        os.remove(entry.path)  # Windows refuses if the file is open in a living process
                        continue
                    with open(entry.path, "rb") as file:
                        if _lock(file) or _is_abandoned(entry.name, os.fstat(file.fileno()).st_mtime):
                            os.remove(entry.path)


def _lock(file: IO[bytes]) -> bool:
    """Lock the file until it is closed or the process ends. Return False if the file system has no locks.

    Raises:
        BlockingIOError: a living process holds the lock.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # ENOLCK, ENOSYS, EOPNOTSUPP, … of network file systems
        return False
    return True


def _temporary_name() -> str:
    return f".{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:12]}{_ENDING}"


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(_ENDING)


def _is_abandoned(name: str, modified: float) -> bool:
    """True if the process that made the file is gone; if that cannot be known, True if the file is old."""
    machine, _, rest = name[1:].partition("-")
    pid = rest.partition("-")[0]
    if machine == _machine() and pid.isdecimal() and hasattr(os, "fork") and not _is_alive(int(pid)):
        return True
    return time.time() - modified > _ABANDONED_SECONDS


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it belongs to another user
        return True
    return True


def _machine() -> str:
    """Tells machines apart that share a file system, without naming them."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]
