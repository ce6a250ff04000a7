"""Which float weights are quantized at the end of a fit, and how they get into the module."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fsspec
from lightning.pytorch import LightningModule, Trainer

from tinyq_lightning.file import HookView, file_sha256, stem_of, without_training_entries
from tinyq_lightning.trainer.checks import checkpoint_callbacks

__all__ = [
    "FloatWeights",
    "choose_float_weights",
    "tested_weights",
]


@dataclass(frozen=True)
class FloatWeights:
    """Float weights with a name.

    Attributes:
        path: the checkpoint that holds them; None where the module does.
        base: the checkpoint's content, without what only training needs.
        stem: what the quantized file is named after.
        folder: where it goes unless told otherwise.
        note: for people: where the weights come from.
    """

    path: str | None
    base: Mapping[str, Any]
    stem: str
    folder: str
    note: str

    @property
    def sha256(self) -> str | None:
        """Of the file; None where there is none."""
        return None if self.path is None else file_sha256(self.path)

    def load_into(self, trainer: Trainer, module: LightningModule) -> None:
        """Load them as Lightning would, hooks included; nothing where the module holds them already."""
        if self.path is not None:
            content = HookView(self.base, type(module), self.path)
            module.on_load_checkpoint(content)
            trainer.strategy.load_model_state_dict(content, strict=module.strict_loading)


def choose_float_weights(trainer: Trainer, wanted: str, monitor: str | None) -> FloatWeights:
    """The weights that ``wanted`` names: ``best``, ``last`` or ``current``.

    Where the ModelCheckpoints of the run saved none of that kind, the module's current weights.

    Args:
        trainer: at the end of a fit.
        wanted: which.
        monitor: prefer the ModelCheckpoint that monitors this metric.
    """
    keepers = sorted(
        checkpoint_callbacks(trainer), key=lambda keeper: monitor is not None and keeper.monitor != monitor
    )
    paths = ((keeper, getattr(keeper, f"{wanted}_model_path", "")) for keeper in keepers)
    keeper, path = next(((keeper, path) for keeper, path in paths if path and _exists(path)), (None, None))
    if keeper is None or path is None:
        why = "" if wanted == "current" else f": no {wanted} checkpoint was saved"
        return current_weights(trainer, f"the weights at the end of training{why}")
    # written by this very run, so it may hold objects of the user's classes
    base = without_training_entries(trainer.strategy.load_checkpoint(path, weights_only=False))
    by = f" ({keeper.monitor})" if wanted == "best" and keeper.monitor else ""
    kind = "latest" if wanted == "best" and not by else wanted
    return FloatWeights(path, base, stem_of(path), os.path.dirname(path), f"{kind} checkpoint{by}")


def current_weights(trainer: Trainer, note: str) -> FloatWeights:
    """The weights that the module holds."""
    base = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
    stem = f"epoch={base['epoch']}-step={base['global_step']}"
    return FloatWeights(None, base, stem, trainer.default_root_dir, note)


def tested_weights(trainer: Trainer, restored: Mapping[str, Any] | None) -> FloatWeights:
    """The weights that a test run restored, or those of the module where it restored none.

    Args:
        trainer: in its test loop.
        restored: the content of the checkpoint, as Lightning read it.
    """
    path = trainer.ckpt_path
    if path is None or restored is None:
        return current_weights(trainer, "the module's weights: no ckpt_path was given")
    return FloatWeights(str(path), restored, stem_of(path), os.path.dirname(path), "ckpt_path")


def _exists(path: str) -> bool:
    fs, location = fsspec.core.url_to_fs(path)
    return bool(fs.exists(location))
