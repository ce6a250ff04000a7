"""Chooses the float weights to quantize, and loads them into the module."""

from __future__ import annotations

import inspect
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import fsspec
from lightning_utilities.core.rank_zero import rank_zero_warn

from tinyq_lightning.errors import CheckpointError, quoted
from tinyq_lightning.file import (
    HookView,
    file_exists,
    file_sha256,
    open_checkpoint,
    stem_of,
    why_not_writable,
    without_training_entries,
)
from tinyq_lightning.namespaces import derives_from
from tinyq_lightning.trainer.checks import checkpoint_callbacks, preferred_keepers
from tinyq_lightning.trainer.inner_trainer import Moment, shadowed
from tinyq_lightning.trainer.ranks import is_sharded

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = [
    "FloatWeights",
    "choose_float_weights",
    "files_before_fit",
    "folder_of",
    "tested_weights",
]


@dataclass(frozen=True)
class FloatWeights:
    """Float weights and where they come from.

    Attributes:
        path: the checkpoint that holds them; None if the module holds them.
        checkpoint: its content; after :meth:`load_into`, without what only training needs. Empty for the checkpoint
            of a sharded model.
        stem: the part of the quantized file's name that names these weights.
        folder: default folder of the quantized file.
        note: where the weights come from, as shown to the user.
        trusted: whether the checkpoint may hold objects, since this run has written it.
    """

    path: str | None
    checkpoint: dict[str, Any]
    stem: str
    folder: str
    note: str
    trusted: bool = True

    @property
    def base(self) -> dict[str, Any]:
        """The checkpoint's content without what only training needs."""
        return without_training_entries(self.checkpoint)

    @property
    def sha256(self) -> str | None:
        """Digest of the checkpoint file; None if there is none."""
        return None if self.path is None else file_sha256(self.path)

    def moment(self, trainer: Trainer) -> Moment:
        """The epoch and step that these weights were saved in; of the current ones, the last of the fit."""
        last = _last_epoch(trainer)
        epoch, step = (self.checkpoint.get(name) for name in ("epoch", "global_step"))
        return Moment(
            min(last, epoch) if isinstance(epoch, int) else last, step if isinstance(step, int) else trainer.global_step
        )

    def load_into(self, trainer: Trainer, module: LightningModule) -> None:
        """Load them as Lightning would, ``on_load_checkpoint`` included; do nothing if the module holds them."""
        if self.path is not None:
            content = HookView(self.checkpoint, type(module), self.path)  # the user's hook may take entries out
            module.on_load_checkpoint(content)
            trainer.strategy.load_model_state_dict(content, strict=module.strict_loading)
        for key in self.checkpoint.keys() - self.base.keys():  # optimizer states need not stay in memory
            del self.checkpoint[key]


def files_before_fit(trainer: Trainer) -> dict[str, object]:
    """The files that ModelCheckpoints name before training, and what tells later whether they were written since.

    A checkpoint that a fit resumes from may name any file as the best one, so these are not taken for the run's own.

    Args:
        trainer: in ``on_fit_start``, with the states of its callbacks restored.

    Returns:
        By path, on rank 0; empty on other ranks.
    """
    if not trainer.is_global_zero:
        return {}
    named: set[str] = set()
    for keeper in checkpoint_callbacks(trainer):
        named |= {keeper.best_model_path, keeper.last_model_path, keeper.kth_best_model_path, *keeper.best_k_models}
    return {path: _version(path) for path in named if path}


def choose_float_weights(
    trainer: Trainer, wanted: str, monitor: str | None, before: Mapping[str, object]
) -> FloatWeights:
    """The ``best``, ``last`` or ``current`` weights; the current ones if no such checkpoint was saved.

    Rank 0 chooses, since files may be visible to it alone and the ModelCheckpoints of other ranks may differ.

    Args:
        trainer: at the end of a fit.
        wanted: ``best``, ``last`` or ``current``.
        monitor: prefer the ModelCheckpoint that monitors this metric.
        before: of :func:`files_before_fit`. A file that has not been written since is read as plain data.

    Raises:
        CheckpointError: such a file holds objects; before Lightning 2.6, also if it is damaged or no checkpoint.
    """
    chosen = _chosen(trainer, wanted, monitor, before)
    if chosen is None:
        return current_weights(trainer, _note_on_current(wanted))
    path, note, own = chosen
    if averaging := _note_on_averaging(trainer):
        rank_zero_warn(f"TinyQ: the {wanted} checkpoint is quantized{averaging}")
    if is_sharded(trainer):  # the strategy would load the checkpoint into the module
        return FloatWeights(path, {}, stem_of(path), os.path.dirname(path), note, own)
    try:  # a file that this run wrote may hold objects of the user's classes
        checkpoint = _read(trainer, path, own)
    except (pickle.UnpicklingError, EOFError, RuntimeError, CheckpointError) as error:
        if own and not isinstance(error, CheckpointError):
            raise CheckpointError(f"{path} cannot be read: {quoted(error)}") from error
        if own or not _tells_of_objects(error):
            raise
        raise CheckpointError(
            f"{path}: this run did not write the file, but only resumed from a checkpoint that names it, so it is read "
            f"as plain data, and it holds objects: {str(error).splitlines()[0]} If you trust the file, quantize it by "
            "Trainer.test(model, ckpt_path=..., weights_only=False) with TinyQCallback(..., when='test_start')"
        ) from error
    return FloatWeights(path, checkpoint, stem_of(path), os.path.dirname(path), note)


def _read(trainer: Trainer, path: str, trust: bool) -> dict[str, Any]:
    load = trainer.strategy.load_checkpoint
    if "weights_only" in inspect.signature(load).parameters:
        return dict(load(path, weights_only=not trust))
    if trust:
        return dict(load(path))
    with open_checkpoint(path) as source:  # before 2.6 Lightning cannot be told that a file is not trusted
        return dict(source.read_all(source.content))


def _tells_of_objects(error: BaseException | None) -> bool:
    """Whether unpickling plain data failed; a :class:`CheckpointError` for that has the reason below it."""
    while error is not None and not isinstance(error, pickle.UnpicklingError):
        error = error.__cause__
    return error is not None


def _note_on_current(wanted: str) -> str:
    why = "" if wanted == "current" else f": no {wanted} checkpoint was saved"
    return f"the weights at the end of training{why}"


def _chosen(
    trainer: Trainer, wanted: str, monitor: str | None, before: Mapping[str, object]
) -> tuple[str, str, bool] | None:
    """Path and note of the checkpoint that rank 0 chooses, and whether this run has written it; or None."""
    chosen = _best_or_last(trainer, wanted, monitor) if trainer.is_global_zero else None
    own = chosen is not None and (chosen[0] not in before or before[chosen[0]] != _version(chosen[0]))
    told: tuple[str, str, bool] | None = trainer.strategy.broadcast(chosen and (*chosen, own))
    return told


def _best_or_last(trainer: Trainer, wanted: str, monitor: str | None) -> tuple[str, str] | None:
    """Path and note of the checkpoint that a ModelCheckpoint saved; None if none did."""
    for keeper in preferred_keepers(trainer, monitor):
        path = getattr(keeper, f"{wanted}_model_path", "")
        if path and file_exists(path):
            by = f" ({keeper.monitor})" if wanted == "best" and keeper.monitor else ""
            kind = "latest" if wanted == "best" and not by else wanted
            return path, f"{kind} checkpoint{by}{_note_on_averaging(trainer)}"
    return None


def _note_on_averaging(trainer: Trainer) -> str:
    """What a checkpoint lacks: StochasticWeightAveraging puts the averages into the module when training ends."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if not any(derives_from(type(each), "StochasticWeightAveraging") for each in callbacks):
        return ""
    return ", without what StochasticWeightAveraging averages: weights='current' takes that"


def _folder_of_run(trainer: Trainer) -> str:
    """Where weights of no file go: the folder of a fit's ModelCheckpoint, or ``default_root_dir``."""
    keepers = checkpoint_callbacks(trainer) if trainer.state.fn == "fit" else ()
    folders = [keeper.dirpath for keeper in keepers if isinstance(keeper.dirpath, (str, os.PathLike))]
    return os.fspath(next(iter(folders), trainer.default_root_dir))


def current_weights(trainer: Trainer, note: str) -> FloatWeights:
    """The weights that the module holds."""
    no_state = [(trainer.strategy, {"lightning_module_state_dict": dict})] if is_sharded(trainer) else []
    with shadowed(no_state):  # no process is to hold all of a sharded one
        base = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
    if trainer.state.fn == "fit":
        base["epoch"] = _last_epoch(trainer)
    stem = f"epoch={base['epoch']}-step={base['global_step']}"
    return FloatWeights(None, base, stem, _folder_of_run(trainer), note)


def _last_epoch(trainer: Trainer) -> int:
    """The epoch that a fit ran last, as ModelCheckpoint counts it: at the end the Trainer has counted past it."""
    return max(0, trainer.fit_loop.epoch_progress.current.ready - 1)


def tested_weights(trainer: Trainer, restored: Mapping[str, Any] | None) -> FloatWeights:
    """The weights that a test run restored, or those of the module if it restored none.

    Args:
        trainer: in its test loop.
        restored: the content of the checkpoint, as Lightning read it.
    """
    path = trainer.ckpt_path
    if path is None or restored is None:
        return current_weights(trainer, "the module's weights: no ckpt_path was given")
    return FloatWeights(str(path), dict(restored), stem_of(path), os.path.dirname(path), "ckpt_path")


def folder_of(trainer: Trainer, source: FloatWeights) -> str:
    """The folder of the float weights, or ``default_root_dir`` with a warning if that cannot be written to."""
    why_not = why_not_writable(source.folder) if trainer.is_global_zero else None
    why_not = trainer.strategy.broadcast(why_not)
    if why_not is None:
        return source.folder
    rank_zero_warn(
        f"TinyQ: {source.folder} cannot be written to ({why_not}), so the quantized checkpoint goes to "
        f"default_root_dir, {trainer.default_root_dir}. Give dirpath to choose another folder"
    )
    return str(trainer.default_root_dir)


def _version(path: str) -> object:
    """What changes if the file is written; None if it does not exist."""
    fs, location = fsspec.core.url_to_fs(path)
    if not fs.exists(location):
        return None
    info = fs.info(location)
    return (info["mtime"], info["size"], info.get("ino")) if "mtime" in info else info
