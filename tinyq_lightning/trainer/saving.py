"""Writes the quantized checkpoint of a run."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from lightning_utilities.core.rank_zero import rank_zero_info

from tinyq_lightning.file import quantized_path, warn_of_left_out, write_checkpoint
from tinyq_lightning.plan import Plan
from tinyq_lightning.trainer.float_weights import FloatWeights, folder_of
from tinyq_lightning.trainer.ranks import write_on_rank_zero

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "save_quantized",
]


def save_quantized(
    trainer: Trainer,
    source: FloatWeights,
    plan: Plan,
    make_content: Callable[[], dict[str, Any]],
    taken: Collection[str],
    told: Collection[str],
) -> tuple[str, list[str]]:
    """Write a checkpoint on rank 0, where the plan's spec has it, and warn there of what it could not hold.

    Args:
        trainer: the user's.
        source: the float weights.
        plan: what was quantized.
        make_content: as :func:`~tinyq_lightning.file.make_checkpoint`; called on each rank.
        taken: paths that callbacks of this run have written.
        told: names of entries that the user was warned of before.

    Returns:
        The path of the file, and the names of all entries that it could not hold.

    Raises:
        TinyQError: on every rank, if the file could not be written.
    """
    save = plan.spec.save
    folder = save.dirpath or folder_of(trainer, source)
    path = quantized_path(save, folder, source.stem, plan.file_label, taken)
    content = make_content()
    write_on_rank_zero(trainer, partial(write_checkpoint, content, path))
    if trainer.is_global_zero:
        warn_of_left_out(content, told)
    if source.path is None:
        rank_zero_info(f"TinyQ: {source.note}; the quantized checkpoint is {path}")
    return path, cast("list[str]", content["tinyq"]["dropped"])
