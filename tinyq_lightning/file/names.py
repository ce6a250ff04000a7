"""Where a quantized file goes and what it is called."""

from __future__ import annotations

import os
from collections.abc import Collection

from tinyq_lightning.errors import SpecError
from tinyq_lightning.spec import QuantizationSpec, Save

__all__ = [
    "check_folder",
    "quantized_path",
    "stem_of",
]


def check_folder(spec: QuantizationSpec) -> None:
    """Refuse a ``dirpath`` that is a file.

    Raises:
        SpecError: it is.
    """
    folder = spec.save.dirpath
    if folder is not None and os.path.isfile(folder):
        raise SpecError(f"{spec.origin.where('save', 'dirpath')}: dirpath {folder!r} is a file, not a folder")


def quantized_path(save: Save, folder: str, stem: str, label: str, taken: Collection[str | None] = ()) -> str:
    """Where the quantized file goes: ``<folder>/<label>-<stem>.ckpt`` unless the spec says otherwise.

    Args:
        save: of the spec.
        folder: of the float checkpoint.
        stem: the float checkpoint's name without its ending.
        label: the plan's.
        taken: paths that other callbacks of the run have written; the name gets a version past them.
    """
    name = (save.filename or f"{label}-{stem}").removesuffix(".ckpt")
    versions = (f"{name}{version}.ckpt" for version in ("", *(f"-v{number}" for number in range(1, len(taken) + 1))))
    paths = (os.path.join(save.dirpath or folder, version) for version in versions)
    return next(path for path in paths if path not in taken)


def stem_of(path: str | os.PathLike[str]) -> str:
    """``epoch=7-step=400`` of ``…/epoch=7-step=400.ckpt``."""
    return os.fspath(path).rpartition("/")[2].removesuffix(".ckpt")
