"""Writes the quantized checkpoint of a run."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from tinyq_lightning.file import warn_of_left_out, write_checkpoint
from tinyq_lightning.trainer.ranks import write_on_rank_zero

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "save_quantized",
]


def save_quantized(trainer: Trainer, content: dict[str, Any], path: str, told: Collection[str]) -> list[str]:
    """Write a checkpoint on rank 0, and warn there of what it could not hold.

    Args:
        trainer: the user's.
        content: from :func:`~tinyq_lightning.file.make_checkpoint`, on each rank.
        path: of the file.
        told: names of entries that the user was warned of before.

    Returns:
        The names of all entries that the file could not hold.

    Raises:
        TinyQError: on every rank, if the file could not be written.
    """
    write_on_rank_zero(trainer, partial(write_checkpoint, content, path))
    if trainer.is_global_zero:
        warn_of_left_out(content, told)
    return cast("list[str]", content["tinyq"]["dropped"])
