"""Lets ``ckpt_path`` of a Trainer be a quantized checkpoint, for a class that knows nothing of quantization."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tinyq_lightning.file import call_hook, is_quantized, restore_structure, without_training_entries
from tinyq_lightning.layers import Int8Weight
from tinyq_lightning.plan import Site

__all__ = [
    "QuantizedStart",
]


class QuantizedStart:
    """From ``setup`` to ``teardown``: puts quantized layers in when a quantized checkpoint is restored.

    The hook ``on_load_checkpoint`` of the module is wrapped on the instance, since a callback's own
    comes after the weights have been loaded.

    Args:
        trainer: in ``setup``.
        module: the user's.

    Attributes:
        restored: the content of the checkpoint that was restored, what only training needs left out, or None.
        label: the method of the checkpoint that was restored, where that is quantized, or None.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self._module = trainer, module
        self._made: list[tuple[Site, Int8Weight]] = []
        self.restored: dict[str, Any] | None = None
        self.label: str | None = None
        hook = partial(self._on_load_checkpoint, module.on_load_checkpoint)
        vars(module)["on_load_checkpoint"] = hook

    def _on_load_checkpoint(self, own: Callable[[Any], Any], checkpoint: dict[str, Any]) -> None:
        self.restored = without_training_entries(checkpoint)
        if is_quantized(checkpoint):
            path = str(self._trainer.ckpt_path)
            self._made = restore_structure(self._module, self._trainer, checkpoint, path)
            self.label = checkpoint["tinyq"].get("label")
            rank_zero_info(f"TinyQ: {path} is quantized already ({self.label}), and is run as it is")
        call_hook(own, type(self._module), checkpoint, str(self._trainer.ckpt_path))

    def close(self) -> None:
        """Float layers again, with the dequantized weights: the module is what was tested, and can train."""
        vars(self._module).pop("on_load_checkpoint", None)
        for site, layer in self._made:
            linear = cast("nn.Linear | nn.Embedding", site.module)
            linear.to(layer.scales.device, layer.dtype)
            with torch.no_grad():
                if parametrize.is_parametrized(linear, "weight"):
                    with suppress(NotImplementedError):  # a parametrization that has no inverse
                        linear.weight = layer.dequantize().to(layer.dtype)
                else:
                    linear.weight.data.copy_(layer.dequantize())
                if isinstance(bias := getattr(linear, "bias", None), nn.Parameter):
                    bias.data.copy_(cast(Tensor, layer.bias))
            site.put(linear)
        self._made = []
