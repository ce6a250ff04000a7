"""Lets ``ckpt_path`` of a Trainer be a quantized checkpoint, for any LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from tinyq_lightning.file import HookView, copied, is_quantized, restore_structure, without_training_entries
from tinyq_lightning.layers import QuantizedLayer
from tinyq_lightning.plan import Site

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = [
    "QuantizedStart",
]


class QuantizedStart:
    """From ``setup`` to ``teardown``: makes the quantized layers before the Trainer restores a quantized checkpoint.

    The Trainer's connector is told to prepare the layers before it restores the model, because a callback's
    own hook is called only after the weights have been loaded. Nothing is set on the module: a copy or a pickle
    of it during the run would take the Trainer along.

    Args:
        trainer: in ``setup``.
        module: the user's.

    Attributes:
        restored: content of the restored checkpoint without what only training needs, or None.
        label: method of the restored checkpoint if that is quantized, else None.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self._module = trainer, module
        self._made: list[tuple[Site, QuantizedLayer]] = []
        self._loaded = False
        self.restored: dict[str, Any] | None = None
        self.label: str | None = None
        self._connector = trainer._checkpoint_connector
        vars(self._connector)["restore_model"] = partial(self._restore_model, self._connector.restore_model)

    def _restore_model(self, restore: Callable[[], None]) -> None:
        checkpoint = self._connector._loaded_checkpoint
        if checkpoint:
            self._prepare(checkpoint)
        if self.label is not None:  # the user's hook may read entries that only the training had
            view = HookView(checkpoint, type(self._module), str(self._trainer.ckpt_path))
            self._connector._loaded_checkpoint = view
        try:
            restore()
            self._loaded = True
        finally:
            self._connector._loaded_checkpoint = checkpoint

    def _prepare(self, checkpoint: dict[str, Any]) -> None:
        self.restored = copied(without_training_entries(checkpoint))  # the user's hook may change the other
        if is_quantized(checkpoint):
            path = str(self._trainer.ckpt_path)
            self._made = restore_structure(self._module, self._trainer, checkpoint, path)
            self.label = checkpoint["tinyq"].get("label")
            rank_zero_info(f"TinyQ: {path} is quantized already ({self.label}), and is run as it is")

    def close(self) -> None:
        """Put the float layers back; with the dequantized weights, able to train, if those were loaded."""
        vars(self._connector).pop("restore_model", None)
        left = []
        for site, layer in self._made:
            if self._loaded and not site.kind.restore(site.module, site.original, layer):
                left.append(site.name)
            site.put(site.module)
        self._made = []
        if left:
            rank_zero_warn(
                f"TinyQ: {', '.join(left)}: a layer that computes its weight from others cannot be given the one of "
                "the quantized file, and has the float weights it had before: load a float checkpoint to train on"
            )
