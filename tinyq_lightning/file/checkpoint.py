"""Makes, writes and reads quantized checkpoints. Nothing in a file is executed."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import IO, Any, cast

import fsspec
import torch

from tinyq_lightning.errors import CheckpointError
from tinyq_lightning.file.archive import Archive
from tinyq_lightning.file.digest import digest_of
from tinyq_lightning.file.durable import replace_file
from tinyq_lightning.file.plain import plain, plain_entries, plain_state
from tinyq_lightning.file.trust import call_with
from tinyq_lightning.file.typed import typed_entries
from tinyq_lightning.file.validate import (
    HYPER_PARAMETERS,
    HYPER_PARAMETERS_TYPE,
    LIGHTNING_VERSION,
    check_format,
    check_layers,
    format_of,
    without_training_entries,
)
from tinyq_lightning.plan import Plan
from tinyq_lightning.version import __version__

__all__ = [
    "check_digests",
    "file_sha256",
    "is_free",
    "make_checkpoint",
    "read_checkpoint",
    "refuse_foreign",
    "warn_of_left_out",
    "write_checkpoint",
]


def make_checkpoint(
    base: Mapping[str, Any],
    state_dict: Mapping[str, Any],
    plan: Plan,
    metrics: Mapping[str, Mapping[str, float]],
    float_sha256: str | None,
    loop: str | None,
) -> dict[str, Any]:
    """The content of a quantized checkpoint, plain data and tensors only.

    Args:
        base: the float checkpoint. Hyper-parameters, epoch, step and the user's own entries are taken from it,
            the entries for going on with the training are not.
        state_dict: of the quantized module.
        plan: what was quantized.
        metrics: of the float and the quantized model.
        float_sha256: of the float file, or None if there is no file.
        loop: the loop that gave the metrics, ``validate`` or ``test``. It is not recorded without metrics.

    Returns:
        The content for :func:`write_checkpoint`.

    Raises:
        CheckpointError: ``state_dict`` lacks the codes of a layer that the plan has as quantized, or holds objects.
    """
    content: dict[str, Any] = {}
    dropped: list[str] = []
    notes: dict[str, list[dict[str, Any]]] = {}
    for key, value in without_training_entries(base).items():
        if key in ("state_dict", "tinyq"):
            continue
        if key == HYPER_PARAMETERS_TYPE:  # a class; Lightning reads its name as well
            content[plain(key)] = plain(getattr(value, "__name__", str(value)))
        elif key in (HYPER_PARAMETERS, "datamodule_hyper_parameters") and isinstance(value, Mapping):
            content[plain(key)] = typed_entries(value, key, dropped, notes.setdefault(key, []))
        else:
            content |= plain_entries({key: value}, dropped)
    types = notes.get(HYPER_PARAMETERS, [])
    configs = {note["path"][0]: note["kind"] for note in types if _is_in_configs(note)}
    content["state_dict"] = plain_state(state_dict)
    tinyq = {
        "format_version": format_of(decision.method for decision in plan),
        "label": plan.label,
        "spec": plan.to_spec().to_dict() | {"save": {"dirpath": None, "filename": None}},  # no paths of this machine
        "plan": plan.to_list(),
        "metrics": {name: dict(values) for name, values in metrics.items()},
        "metrics_from": loop if metrics else None,
        "float_sha256": float_sha256,
        "dropped": dropped,
        "configs": configs,
        "types": [note for note in types if not _is_in_configs(note)],
        "versions": {
            "torch": torch.__version__.split("+")[0],
            "lightning": _version_of_lightning(),
            "tinyq_lightning": __version__,
        },
    }
    content["tinyq"] = plain(tinyq)
    check_layers(content, "the quantized checkpoint")
    content["tinyq"]["digests"] = plain(_digests(content))
    return content


def warn_of_left_out(content: Mapping[str, Any], told: Collection[str] = ()) -> None:
    """Warn of the entries that a quantized checkpoint could not hold, and say how to give them when loading it.

    Args:
        content: from :func:`make_checkpoint`.
        told: names of entries that the user was warned of before.
    """
    dropped = [name for name in content["tinyq"]["dropped"] if name not in told]
    if not dropped:
        return
    # the data module is not built when a file is loaded, so its arguments are not asked for
    asked = [name for name in dropped if not name.startswith("datamodule_hyper_parameters.")]
    call = call_with(None, asked[0].removeprefix(f"{HYPER_PARAMETERS}.")) if asked else ""
    advice = f". Give them when loading it, as in {call}" if asked else ""
    warnings.warn(
        f"the quantized checkpoint holds plain data only, so these were left out: {', '.join(dropped)}{advice}",
        stacklevel=2,
    )


def _version_of_lightning() -> str:
    for name in ("lightning", "pytorch-lightning"):
        with suppress(PackageNotFoundError):
            return version(name)
    return "none"


def _is_in_configs(note: Mapping[str, Any]) -> bool:
    """True for what the first readers of the format turn back, by the key ``configs``."""
    return len(note["path"]) == 1 and note["kind"] in ("omegaconf", "namespace") and "class" not in note


def _digests(content: Mapping[str, Any]) -> dict[str, str]:
    """The digest of each entry except the Lightning version, which Lightning updates when it reads a file."""
    parts = {key: value for key, value in content.items() if key != LIGHTNING_VERSION}
    parts["tinyq"] = {key: value for key, value in content["tinyq"].items() if key != "digests"}
    state_dict = content["state_dict"]
    parts["state_dict"] = [dict(state_dict), getattr(state_dict, "_metadata", None)]
    return {key: digest_of(value) for key, value in parts.items()}


def file_sha256(path: str | os.PathLike[str]) -> str | None:
    """SHA-256 of a local or remote file; None for a folder, such as a distributed checkpoint."""
    fs, location = fsspec.core.url_to_fs(os.fspath(path))
    if fs.isdir(location):
        return None
    digest = hashlib.sha256()
    with fs.open(location, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_checkpoint(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a checkpoint; the file is complete or not there, see :func:`~tinyq_lightning.file.durable.replace_file`.

    A quantized checkpoint that is there already is replaced, with a warning if it was made from another float file.
    Any other file is not replaced.

    Args:
        content: from :func:`make_checkpoint`.
        path: a local path or a URL that fsspec can open. Missing folders are made.

    Raises:
        CheckpointError: the file could not be written; what was there before is unchanged.
    """
    before = _existing(path)
    # an open file, because torch.save writes the name of a named file into it, which changes the bytes
    replace_file(path, partial(torch.save, content))
    if before is not None and before["float_sha256"] != content["tinyq"]["float_sha256"]:
        warnings.warn(f"{path}: a quantized checkpoint of another float checkpoint was replaced", stacklevel=2)


def is_free(path: str | os.PathLike[str], content: Mapping[str, Any], beside_float: bool) -> bool:
    """Return True if a quantized checkpoint can be written to ``path`` and nothing is lost by that.

    So it is where there is no file, or one with the same content. Beside its float file it may also replace what was
    made from a former float file of that name.

    Args:
        path: a local path or a URL that fsspec can open.
        content: from :func:`make_checkpoint`.
        beside_float: whether the float file, if there is one, lies in the same folder and gives this one its name.
    """
    try:
        before = _existing(path)
    except CheckpointError:
        return False
    if before is None or before["digests"] == content["tinyq"]["digests"]:
        return True
    former, own = before["float_sha256"], content["tinyq"]["float_sha256"]
    return beside_float and former != own and None not in (former, own)


def refuse_foreign(path: str | os.PathLike[str]) -> None:
    """Check that no file but a quantized checkpoint would be replaced at ``path``.

    Raises:
        CheckpointError: there is such a file.
    """
    _existing(path)


def _existing(path: str | os.PathLike[str]) -> Mapping[str, Any] | None:
    """The ``tinyq`` block of the quantized checkpoint at ``path``; None if there is no file."""
    fs, location = fsspec.core.url_to_fs(os.fspath(path))
    if not fs.exists(location):
        return None
    try:
        with Archive(path) as archive:
            check_format(archive.content, path)
            return cast("Mapping[str, Any]", archive.content["tinyq"])
    except CheckpointError as error:
        raise CheckpointError(
            f"{path}: there is a file already that is not a quantized checkpoint of this version, and it is not "
            "overwritten: choose another dirpath or filename"
        ) from error


def read_checkpoint(path: str | os.PathLike[str] | IO[bytes]) -> dict[str, Any]:
    """Read a quantized checkpoint onto the CPU; nothing in it is executed.

    Raises:
        CheckpointError: there is no such file, it is damaged, not a quantized checkpoint, or of a newer
            format.
    """
    with Archive(path) as archive:
        check_format(archive.content, archive.path)
        content = cast("dict[str, Any]", archive.read_all(archive.content))
    check_digests(content, archive.path)
    check_layers(content, archive.path)
    return content


def check_digests(content: Mapping[str, Any], path: str | os.PathLike[str], only: Collection[str] = ()) -> None:
    """Compare the content with the digests that were written with it.

    Args:
        content: of a quantized checkpoint, with its tensors.
        path: for the error.
        only: the entries to check; all of them if empty.

    Raises:
        CheckpointError: an entry is not bit for bit what was written.
    """
    written = content["tinyq"]["digests"]
    try:
        found = _digests({key: content[key] for key in only} if only else content)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the file is damaged, or holds more than tensors and plain data") from error
    names = set(only) or {*written, *found}
    wrong = sorted(str(name) for name in names if written.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(f"{path}: the file is damaged: {', '.join(wrong)} differs from what was written")
