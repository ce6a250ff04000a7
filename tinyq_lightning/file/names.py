"""The folder and the name of a quantized file."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import fsspec

from tinyq_lightning.errors import CheckpointError, SpecError, TinyQError
from tinyq_lightning.spec import QuantizationSpec, Save

__all__ = [
    "check_folder",
    "file_bytes",
    "file_exists",
    "quantized_paths",
    "refuse_existing",
    "stem_of",
]

_ENDINGS = (".ckpt", ".pt", ".pth")


def check_folder(spec: QuantizationSpec) -> None:
    """Check the spec's ``save.dirpath``.

    Raises:
        SpecError: it is a file, not a folder.
    """
    folder = spec.save.dirpath
    if folder is not None and os.path.isfile(folder):
        raise SpecError(f"{spec.origin.where('save', 'dirpath')}: dirpath {folder!r} is a file, not a folder")


def quantized_paths(save: Save, folder: str, stem: str, label: str) -> Iterator[str]:
    """The path of the quantized file: ``<folder>/<label>-<stem>.ckpt`` unless ``save`` gives another.

    Args:
        save: the spec's ``save`` entry.
        folder: the folder of the float checkpoint.
        stem: the float checkpoint's name without its ending.
        label: the label of the plan.

    Yields:
        The path, then those to take if it is taken: with ``-v1``, ``-v2``, … added to the name.
    """
    name = (save.filename or f"{label}-{stem}").removesuffix(".ckpt")
    yield os.path.join(save.dirpath or folder, f"{name}.ckpt")
    for number in itertools.count(1):
        yield os.path.join(save.dirpath or folder, f"{name}-v{number}.ckpt")


def stem_of(path: str | os.PathLike[str]) -> str:
    """The name of a checkpoint without folder and ending: ``epoch=7`` for ``runs/epoch=7.ckpt``."""
    name = os.fspath(path).rstrip("/").rpartition("/")[2]
    return next((name.removesuffix(ending) for ending in _ENDINGS if name.endswith(ending)), name)


def file_exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file or folder at a local path or a URL that fsspec can open."""
    fs, location = fsspec.core.url_to_fs(os.fspath(path))
    return bool(fs.exists(location))


def refuse_existing(path: str | os.PathLike[str], overwrite: bool, error: type[TinyQError] = CheckpointError) -> None:
    """Check that nothing is replaced that the user has not given up.

    Raises:
        TinyQError: of the given kind: there is such a file, and ``overwrite`` is not set.
    """
    if not overwrite and file_exists(path):
        raise error(f"{path}: there is such a file already: give --overwrite (overwrite=True) or another path")


def file_bytes(path: str | os.PathLike[str]) -> int:
    """The size of a file at a local path or a URL that fsspec can open."""
    fs, location = fsspec.core.url_to_fs(os.fspath(path))
    return int(fs.size(location))
