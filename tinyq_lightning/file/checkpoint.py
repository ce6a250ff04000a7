"""The quantized file: written whole or not at all, read without running anything from it, loaded bit-equal."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Collection, Mapping
from functools import partial
from importlib.metadata import version
from typing import Any, cast

import fsspec
import torch

from tinyq_lightning.errors import CheckpointError
from tinyq_lightning.file.archive import Archive
from tinyq_lightning.file.digest import digest_of
from tinyq_lightning.file.durable import replace_file
from tinyq_lightning.file.plain import kind_of_config, plain, plain_entries, plain_state
from tinyq_lightning.plan import Plan
from tinyq_lightning.spec import METHOD_NAMES
from tinyq_lightning.version import __version__

__all__ = [
    "FORMAT_VERSION",
    "check_digests",
    "check_format",
    "file_sha256",
    "is_quantized",
    "make_checkpoint",
    "read_checkpoint",
    "without_training_entries",
    "write_checkpoint",
]

FORMAT_VERSION = 1
"""Of the ``tinyq`` block. A reader refuses a newer one and reads every older one."""


# Entries of a Lightning checkpoint, as LightningModule.CHECKPOINT_HYPER_PARAMS_KEY and its sisters name them. Spelled
# out here, since reading a file must not need Lightning.
HYPER_PARAMETERS = "hyper_parameters"
HYPER_PARAMETERS_NAME = "hparams_name"
HYPER_PARAMETERS_TYPE = "hparams_type"
_LIGHTNING_VERSION = "pytorch-lightning_version"


# What a float checkpoint holds for going on with the training, which an int8 model cannot do.
_TRAINING_KEYS = {
    "callbacks",
    "optimizer_states",
    "lr_schedulers",
    "loops",
    "current_model_state",
    "averaging_state",
    "MixedPrecision",
    "native_amp_scaling_state",
}


def without_training_entries(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint without optimizer states, loops and the like."""
    return {key: value for key, value in checkpoint.items() if key not in _TRAINING_KEYS}


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
        base: the float checkpoint: hyper-parameters, epoch, step and the user's own entries come over,
            what only training needs does not.
        state_dict: of the quantized module.
        plan: what was quantized.
        metrics: before and after.
        float_sha256: of the float file; None where there is none.
        loop: where the metrics come from, ``validate`` or ``test``; not recorded where there are none.

    Returns:
        What :func:`write_checkpoint` takes.
    """
    content: dict[str, Any] = {}
    dropped: list[str] = []
    hyper_parameters = dict(base.get(HYPER_PARAMETERS, {}))
    for key, value in without_training_entries(base).items():
        if key in ("state_dict", "tinyq"):
            continue
        if key == HYPER_PARAMETERS_TYPE:
            content[plain(key)] = plain(
                getattr(value, "__name__", str(value))
            )  # a class; Lightning reads its name as well
        elif key in (HYPER_PARAMETERS, "datamodule_hyper_parameters"):
            content[plain(key)] = plain_entries(value, key, dropped)
        else:
            content |= plain_entries({key: value}, "", dropped)
    content["state_dict"] = plain_state(state_dict)
    tinyq = {
        "format_version": FORMAT_VERSION,
        "label": plan.label,
        "spec": plan.to_spec().to_dict() | {"save": {"dirpath": None, "filename": None}},  # no paths of this machine
        "plan": plan.to_list(),
        "metrics": {name: dict(values) for name, values in metrics.items()},
        "metrics_from": loop if metrics else None,
        "float_sha256": float_sha256,
        "dropped": dropped,
        "configs": {name: kind for name, value in hyper_parameters.items() if (kind := kind_of_config(value))},
        "versions": {
            "torch": torch.__version__.split("+")[0],
            "lightning": version("lightning"),
            "tinyq_lightning": __version__,
        },
    }
    content["tinyq"] = plain(tinyq)
    content["tinyq"]["digests"] = plain(_digests(content))
    if dropped:
        warnings.warn(
            f"the quantized checkpoint holds plain data only, so these were left out: {', '.join(dropped)}. Pass them "
            "as init arguments when loading it",
            stacklevel=2,
        )
    return content


def _digests(content: Mapping[str, Any]) -> dict[str, str]:
    """The digest of each entry, but for the version that Lightning brings up to date when it reads a file."""
    parts = {key: value for key, value in content.items() if key != _LIGHTNING_VERSION}
    parts["tinyq"] = {key: value for key, value in content["tinyq"].items() if key != "digests"}
    state_dict = content["state_dict"]
    parts["state_dict"] = [dict(state_dict), getattr(state_dict, "_metadata", None)]
    return {key: digest_of(value) for key, value in parts.items()}


def file_sha256(path: str | os.PathLike[str]) -> str | None:
    """SHA-256 of a file, local or remote; None for a folder, which distributed checkpoints are."""
    fs, location = fsspec.core.url_to_fs(os.fspath(path))
    if fs.isdir(location):
        return None
    digest = hashlib.sha256()
    with fs.open(location, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_checkpoint(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a checkpoint whole or not at all; see :func:`~tinyq_lightning.file.durable.replace_file`.

    A quantized checkpoint of another float file that is there already is replaced with a warning; any
    other file is not.

    Args:
        content: from :func:`make_checkpoint`.
        path: local, or a URL that fsspec knows. Folders are made.

    Raises:
        CheckpointError: it could not be written; what was there before is untouched.
    """
    before = _existing(path)
    # an open file, not a name: torch.save puts names into the file, and with them their bytes
    replace_file(path, partial(torch.save, content))
    if before is not None and before["float_sha256"] != content["tinyq"]["float_sha256"]:
        warnings.warn(f"{path}: a quantized checkpoint of another float checkpoint was replaced", stacklevel=2)


def _existing(path: str | os.PathLike[str]) -> Mapping[str, Any] | None:
    """The ``tinyq`` block of the quantized checkpoint at ``path``; None where there is nothing."""
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


def is_quantized(checkpoint: Any) -> bool:
    """Whether a loaded checkpoint is one of ours."""
    return isinstance(checkpoint, Mapping) and isinstance(checkpoint.get("tinyq"), Mapping)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a quantized checkpoint onto the CPU; nothing in it is executed.

    Raises:
        CheckpointError: there is no such file, it is damaged, not a quantized checkpoint, or of a newer
            format.
    """
    with Archive(path) as archive:
        check_format(archive.content, path)
        content = cast("dict[str, Any]", archive.read_all(archive.content))
    check_digests(content, path)
    return content


def check_format(content: Any, path: str | os.PathLike[str]) -> None:
    """Refuse what is not a quantized checkpoint of a format that this version reads.

    Raises:
        CheckpointError: it is not.
    """
    if not is_quantized(content):
        lightning_made = isinstance(content, Mapping) and _LIGHTNING_VERSION in content
        kind = "a float Lightning checkpoint" if lightning_made else "no Lightning checkpoint"
        raise CheckpointError(f"{path}: this is {kind}, not a quantized one")
    tinyq = content["tinyq"]
    found = tinyq.get("format_version")
    if not isinstance(found, int) or found > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {found!r} is newer than {FORMAT_VERSION}, the newest that tinyq_lightning "
            f"{__version__} reads: upgrade it"
        )
    kinds = {"spec": dict, "plan": list, "metrics": dict, "digests": dict, "versions": dict, "label": str}
    wrong = [key for key, kind in kinds.items() if not isinstance(tinyq.get(key), kind)]
    wrong += [] if isinstance(content.get("state_dict"), dict) else ["state_dict"]
    wrong += [] if "float_sha256" in tinyq else ["float_sha256"]
    decisions = tinyq["plan"] if "plan" not in wrong else []
    if not all(
        isinstance(d, dict) and d.get("method") in METHOD_NAMES and isinstance(d.get("name"), str) for d in decisions
    ):
        wrong.append("plan")
    if wrong:
        raise CheckpointError(f"{path}: the file is damaged: it has no {', '.join(wrong)}")


def check_digests(content: Mapping[str, Any], path: str | os.PathLike[str], only: Collection[str] = ()) -> None:
    """Refuse content that is not what was written, bit by bit.

    Args:
        content: of a quantized checkpoint, with its tensors.
        path: for the error.
        only: entries to check; all by default.

    Raises:
        CheckpointError: it is not.
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
