"""Which weights the validations of a fit ran on: callbacks may put others in for them, such as an average."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tinyq_lightning.handover import copies_on_cpu
from tinyq_lightning.trainer.callback_base import CallbackOfBoth
from tinyq_lightning.trainer.evaluation import weights_digest

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = [
    "ValidatedWeights",
    "WatchesValidation",
]


class ValidatedWeights:
    """Digests of the weights that the validations of a fit ran on, and whether training went on with them.

    Attributes:
        logged: the names that these validations have logged, without what Lightning adds to them.
    """

    def __init__(self) -> None:
        self._digests: set[int] = set()
        self._last: int | None = None
        self._exchanged = False
        self.logged: set[str] = set()

    def in_validation(self, module: LightningModule) -> None:
        """Note the weights of a validation, once its first batch begins."""
        self._last = weights_digest(module)
        self._digests.add(self._last)

    def in_training(self, module: LightningModule) -> None:
        """Compare with the weights that training goes on with; the first call after a validation does."""
        if self._last is not None:
            self._exchanged |= weights_digest(module) != self._last
        self._last = None

    def are_others(self, module: LightningModule) -> bool:
        """Whether other weights were put in for validation, and no validation ran on those that ``module`` holds."""
        return self._exchanged and weights_digest(module) not in self._digests


class WatchesValidation(CallbackOfBoth):
    """Notes in ``validated`` which weights the validations of a fit run on.

    Attributes:
        keeps_batch: whether to keep a copy of the first batch of the run.
        first_batch: that copy, on the CPU of rank 0; None before there is one.
    """

    validated: ValidatedWeights
    keeps_batch: bool = False
    first_batch: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self.validated = ValidatedWeights()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """At the first batch: all that puts weights in has done so."""
        self.keep_batch(trainer, batch)
        if batch_idx == dataloader_idx == 0 and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.validated.in_validation(pl_module)

    def keep_batch(self, trainer: Trainer, batch: Any) -> None:
        """Keep a copy of the first batch, if it is wanted."""
        if self.keeps_batch and self.first_batch is None and trainer.is_global_zero:
            self.first_batch = copies_on_cpu(batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the validation has logged."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            results = trainer.fit_loop.epoch_loop.val_loop._results
            self.validated.logged.update(each.meta.name for each in results.values() if not each.has_reset)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """After a validation within an epoch, training goes on here."""
        self.validated.in_training(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a validation at the end of an epoch, training goes on here."""
        self.validated.in_training(pl_module)
