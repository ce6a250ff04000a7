"""Checks before training, of a module that one process holds or of a sharded one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_utilities.core.rank_zero import rank_zero_warn

from tinyq_lightning.layers import QuantizedLayer
from tinyq_lightning.spec import QuantizationSpec
from tinyq_lightning.table import first_of
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
    _warn_of_codes(module)
    if is_sharded(trainer):
        refuse_measuring_sharded(trainer, spec)
        module = unsharded_twin(module)
    return check_whole(trainer, module, spec, monitor, save)


def _warn_of_codes(module: LightningModule) -> None:
    """Warn of layers that are quantized already and not frozen: the training would change their biases alone."""
    names = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, QuantizedLayer) and any(parameter.requires_grad for parameter in layer.parameters())
    ]
    if names:
        rank_zero_warn(
            f"TinyQ: the training will not change the weights of {first_of(names)}, which are codes already, but only "
            "their biases: train the float model and quantize that, or freeze these layers, as in "
            f"module.{names[0]}.requires_grad_(False)"
        )
