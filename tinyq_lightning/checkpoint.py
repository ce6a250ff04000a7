"""The quantized file: written whole or not at all, read without running anything from it, loaded bit-equal."""

from __future__ import annotations

import hashlib
import os
import pickle
import uuid
import warnings
from collections.abc import Collection, Mapping
from typing import Any, cast

import fsspec
import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from tinyq_lightning.errors import CheckpointError, SpecError
from tinyq_lightning.plain import kind_of_config, plain, plain_entries, plain_state
from tinyq_lightning.plan import Plan
from tinyq_lightning.spec import QuantizationSpec, Save
from tinyq_lightning.version import __version__

__all__ = [
    "FORMAT_VERSION",
    "check_folder",
    "check_format",
    "file_sha256",
    "is_quantized",
    "make_checkpoint",
    "quantized_path",
    "read_checkpoint",
    "save_checkpoint",
    "stem_of",
    "without_training_entries",
    "write_checkpoint",
]

FORMAT_VERSION = 1
"""Of the ``tinyq`` block. A reader refuses a newer one and reads every older one."""

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
    loop: str,
) -> dict[str, Any]:
    """The content of a quantized checkpoint, plain data and tensors only.

    Args:
        base: the float checkpoint: hyper-parameters, epoch, step and the user's own entries come over,
            what only training needs does not.
        state_dict: of the quantized module.
        plan: what was quantized.
        metrics: before and after.
        float_sha256: of the float file; None where there is none.
        loop: where the metrics come from, ``validate`` or ``test``.

    Returns:
        What :func:`write_checkpoint` takes.
    """
    content: dict[str, Any] = {}
    dropped: list[str] = []
    hyper_parameters = dict(base.get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, {}))
    for key, value in without_training_entries(base).items():
        if key in ("state_dict", "tinyq"):
            continue
        if key == LightningModule.CHECKPOINT_HYPER_PARAMS_TYPE:
            content[key] = getattr(value, "__name__", str(value))  # a class; Lightning reads its name as well
        elif key in (LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, "datamodule_hyper_parameters"):
            content[key] = plain_entries(value, key, dropped)
        else:
            content |= plain_entries({key: value}, "", dropped)
    content["state_dict"] = plain_state(state_dict)
    tinyq = {
        "format_version": FORMAT_VERSION,
        "label": plan.label,
        "spec": plan.to_spec().to_dict() | {"save": {"dirpath": None, "filename": None}},  # no paths of this machine
        "plan": plan.to_list(),
        "metrics": {name: dict(values) for name, values in metrics.items()},
        "metrics_from": loop,
        "float_sha256": float_sha256,
        "dropped": dropped,
        "configs": {name: kind for name, value in hyper_parameters.items() if (kind := kind_of_config(value))},
        "versions": {
            "torch": torch.__version__.split("+")[0],
            "lightning": lightning.__version__,
            "tinyq_lightning": __version__,
        },
    }
    content["tinyq"] = plain(tinyq)
    content["tinyq"]["digest"] = _digest(content)
    if dropped:
        warnings.warn(
            f"the quantized checkpoint holds plain data only, so these were left out: {', '.join(dropped)}. Pass them "
            "as init arguments when loading it",
            stacklevel=2,
        )
    return content


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 over every tensor (name, dtype, shape, bytes) and the plan, in order of the names."""
    digest = hashlib.sha256()
    tensors = {name: value for name, value in content["state_dict"].items() if isinstance(value, Tensor)}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    tinyq = {key: value for key, value in content["tinyq"].items() if key != "digest"}
    digest.update(repr(sorted(tinyq.items())).encode())
    return digest.hexdigest()


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
    """Write a checkpoint whole or not at all: to a temporary name beside it, flushed, then renamed.

    Args:
        content: from :func:`make_checkpoint`.
        path: local, or a URL that fsspec knows. Folders are made.

    Raises:
        CheckpointError: it could not be written; what was there before is untouched.
    """
    fs, location = fsspec.core.url_to_fs(os.fspath(path))
    local = isinstance(fs, fsspec.implementations.local.LocalFileSystem)
    folder, _, name = location.rpartition("/")
    temporary = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        fs.makedirs(folder, exist_ok=True)
        try:
            # an open file, not a name: torch.save puts names into the file, and with them their bytes
            with fs.open(temporary, "wb") as file:
                torch.save(content, file)
                file.flush()
                if local:
                    os.fsync(file.fileno())
            if local:
                os.replace(temporary, location)
            else:
                fs.mv(temporary, location)
        finally:
            if fs.exists(temporary):
                fs.rm(temporary)
    except OSError as error:
        raise CheckpointError(f"{path}: the quantized checkpoint could not be written: {error}") from error


def save_checkpoint(trainer: Trainer, content: Mapping[str, Any], path: str) -> None:
    """Write a checkpoint on rank 0, and have every rank know whether that went well.

    Raises:
        CheckpointError: on every rank, where rank 0 could not write it.
    """
    failure: str | None = None
    if trainer.is_global_zero:
        try:
            write_checkpoint(content, path)
        except CheckpointError as error:
            failure = str(error)
    failure = trainer.strategy.broadcast(failure)
    if failure is not None:
        raise CheckpointError(failure)


def is_quantized(checkpoint: Any) -> bool:
    """Whether a loaded checkpoint is one of ours."""
    return isinstance(checkpoint, Mapping) and isinstance(checkpoint.get("tinyq"), Mapping)


def read_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """Read a quantized checkpoint; nothing in it is executed.

    Raises:
        CheckpointError: there is no such file, it is damaged, not a quantized checkpoint, or of a newer
            format.
    """
    try:
        fs, location = fsspec.core.url_to_fs(os.fspath(path))
        with fs.open(location, "rb") as file:
            content = torch.load(file, map_location=map_location, weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: damaged, or not a quantized checkpoint: it holds more than tensors and plain data"
        ) from error
    except Exception as error:  # a damaged archive raises whatever its reader stumbles over
        raise CheckpointError(f"{path}: the file is damaged or no checkpoint: {error}") from error
    check_format(content, path)
    if _digest(content) != content["tinyq"]["digest"]:
        raise CheckpointError(f"{path}: the file is damaged: its tensors or its plan are not those that were written")
    return cast("dict[str, Any]", content)


def check_format(content: Any, path: str | os.PathLike[str]) -> None:
    """Refuse what is not a quantized checkpoint of a format that this version reads.

    Raises:
        CheckpointError: it is not.
    """
    if not is_quantized(content):
        kind = "a float Lightning checkpoint" if "pytorch-lightning_version" in content else "no Lightning checkpoint"
        raise CheckpointError(f"{path}: this is {kind}, not a quantized one")
    version = content["tinyq"].get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version!r} is newer than {FORMAT_VERSION}, the newest that tinyq_lightning "
            f"{__version__} reads: upgrade it"
        )
    missing = {"plan", "digest", "spec"} - set(content["tinyq"])
    if missing or not isinstance(content.get("state_dict"), Mapping):
        raise CheckpointError(f"{path}: the file is damaged: it has no {', '.join(sorted(missing)) or 'state_dict'}")


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
