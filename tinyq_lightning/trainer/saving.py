"""Writes the quantized checkpoint of a run."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import NamedTuple, cast

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info

from tinyq_lightning.file import make_checkpoint, quantized_path, warn_of_left_out, write_checkpoint
from tinyq_lightning.plan import Plan
from tinyq_lightning.spec import Save
from tinyq_lightning.trainer.float_weights import FloatWeights, folder_of
from tinyq_lightning.trainer.ranks import write_on_rank_zero
from tinyq_lightning.trainer.results import Results

__all__ = [
    "SaveAs",
    "save_quantized",
]


class SaveAs(NamedTuple):
    """How a checkpoint is saved.

    Attributes:
        save: the spec's ``save``.
        taken: paths that this run has written already.
        told: names of entries that no file can hold, of which the user was warned before.
    """

    save: Save
    taken: Collection[str]
    told: Collection[str]


def save_quantized(
    trainer: Trainer,
    module: LightningModule,
    source: FloatWeights,
    plan: Plan,
    results: Results,
    loop: str | None,
    how: SaveAs,
) -> tuple[str, list[str]]:
    """Write a checkpoint on rank 0, and warn there of what it could not hold.

    Args:
        trainer: the user's.
        module: with the quantized layers in it.
        source: the float weights.
        plan: what was quantized.
        results: of the float and the quantized model.
        loop: the loop that gave them.
        how: where it goes.

    Returns:
        The path, and the names of all entries that the file could not hold.

    Raises:
        TinyQError: on every rank, if the file could not be written.
    """
    folder = how.save.dirpath or folder_of(trainer, source)
    path = quantized_path(how.save, folder, source.stem, plan.file_label, how.taken)
    content = make_checkpoint(source.base, module.state_dict(), plan, results, source.sha256, loop)
    write_on_rank_zero(trainer, partial(write_checkpoint, content, path))
    if trainer.is_global_zero:
        warn_of_left_out(content, how.told)
    if source.path is None:
        rank_zero_info(f"TinyQ: {source.note}; the quantized checkpoint is {path}")
    return path, cast("list[str]", content["tinyq"]["dropped"])
