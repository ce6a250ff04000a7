"""Writes the quantized checkpoint of a run."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, cast

from lightning_utilities.core.rank_zero import rank_zero_info

from tinyq_lightning.file import is_free, quantized_paths, warn_of_left_out, write_checkpoint
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

    A file that says something else than this one stays, and the name gets a version; a name that the spec gives is
    written to nevertheless.

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
    paths = (path for path in quantized_paths(save, folder, source.stem, plan.file_label) if path not in taken)
    content, beside = make_content(), folder == source.folder

    def write() -> str:
        path = next(path for path in paths if save.filename is not None or is_free(path, content, beside))
        write_checkpoint(content, path)
        return path

    path = cast(str, trainer.strategy.broadcast(write_on_rank_zero(trainer, write)))
    if trainer.is_global_zero:
        warn_of_left_out(content, told)
    if source.path is None:
        rank_zero_info(f"TinyQ: {source.note}; the quantized checkpoint is {path}")
    return path, cast("list[str]", content["tinyq"]["dropped"])
