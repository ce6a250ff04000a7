"""Checks before training, of a module that one process holds or of a sharded one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinyq_lightning.spec import QuantizationSpec
from tinyq_lightning.trainer.checks import check_before_fit as check_whole
from tinyq_lightning.trainer.ranks import is_sharded
from tinyq_lightning.trainer.sharded import refuse_measuring_sharded
from tinyq_lightning.trainer.twin import unsharded_twin

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = [
    "check_before_fit",
]


def check_before_fit(
    trainer: Trainer, module: LightningModule, spec: QuantizationSpec, monitor: str | None, save: bool
) -> list[str]:
    """As :func:`~tinyq_lightning.trainer.checks.check_before_fit`, which checks a sharded module as it would be whole.

    Raises:
        TinyQError: something cannot be quantized, measured or saved after the training.
    """
    if is_sharded(trainer):
        refuse_measuring_sharded(trainer, spec)
        module = unsharded_twin(module)
    return check_whole(trainer, module, spec, monitor, save)
