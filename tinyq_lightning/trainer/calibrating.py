"""Calibration in a run: codes chosen by the user's own validation batches, which their own loop runs the model on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from tinyq_lightning.errors import EvaluationError, quoted
from tinyq_lightning.methods import METHODS
from tinyq_lightning.plan import Recoded, Swap
from tinyq_lightning.search import calibrate, why_of_no_use
from tinyq_lightning.trainer.checks import why_never_validated
from tinyq_lightning.trainer.evaluation import dataloaders, run_evaluation, validation_data_lent
from tinyq_lightning.trainer.inner_trainer import Moment, quiet

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = [
    "Calibrator",
    "calibrated_in_test",
    "validation_data_in_test",
]


class Calibrator:
    """Calibrates swaps of one module by the first batches of its validation loop.

    With several processes, each reads its own batches, and the sums of all choose the same codes in each. Methods that
    have the same codes are calibrated once.

    Args:
        trainer: the user's, whose validation dataloaders are set up.
        module: the user's, float.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self._module = trainer, module
        self._found: dict[tuple[tuple[str, int], ...], dict[str, Recoded]] = {}

    def calibrated(self, swap: Swap, moment: Moment | None = None) -> Swap:
        """The swap with codes chosen by data, if its spec asks for that.

        Args:
            swap: out of the module.
            moment: the epoch and step that the loop is told; None: those of the user's Trainer now.

        Raises:
            EvaluationError: the validation loop failed.
            ModelError: the data cannot be used.
        """
        asked = swap.plan.spec.calibrate
        if asked is None:
            return swap

        def read(next_batch: Callable[[], None]) -> None:
            run_evaluation(self._trainer, self._module, "validate", asked.batches, moment=moment, each_batch=next_batch)

        key = tuple(
            (decision.name, METHODS[decision.method].bits) for decision in swap.plan if decision.method in METHODS
        )
        if key not in self._found:
            self._found[key] = calibrate(swap, read, self._combine if self._trainer.world_size > 1 else None)
            if why := why_of_no_use(swap, self._found[key]):
                rank_zero_warn(f"TinyQ: codes were chosen without data, since it is of no use to any layer: {why}")
        return swap.recoded(self._found[key])

    def _combine(self, sums: Tensor) -> None:
        """Add those of all processes, in place."""
        together = sums.to(self._trainer.strategy.root_device)
        dist.all_reduce(together)
        sums.copy_(together)


def calibrated_in_test(trainer: Trainer, module: LightningModule, swap: Swap) -> Swap:
    """As :meth:`Calibrator.calibrated`, at the start of a test: by validation data. The test data is never used.

    Args:
        trainer: the user's, in ``on_test_start``.
        module: the user's, float.
        swap: out of the module.

    Raises:
        EvaluationError: there is no validation data, or the validation loop failed.
        ModelError: the data cannot be used.
    """
    if swap.plan.spec.calibrate is None:
        return swap
    with validation_data_in_test(trainer, module, "calibrate chooses codes by"):
        return Calibrator(trainer, module).calibrated(swap)


@contextmanager
def validation_data_in_test(trainer: Trainer, module: LightningModule, needs: str) -> Iterator[None]:
    """Context manager in which a test run has its validation dataloaders; then module and Trainer are as before.

    Args:
        trainer: the user's, in a test.
        module: the user's.
        needs: what needs them, as the beginning of a sentence that goes on with "validation data".

    Raises:
        EvaluationError: there are none.
    """
    if why := why_never_validated(trainer, module):
        raise EvaluationError(f"{needs} the validation loop, but {why}")
    try:
        with validation_data_lent(trainer, module):
            _set_up_validation_data(trainer, needs)
            yield
    finally:
        trainer.strategy.model_to_device()  # an inner Trainer leaves the module on the CPU


def _set_up_validation_data(trainer: Trainer, needs: str) -> None:
    """Ask for the validation dataloaders, which a test run does not need itself.

    Raises:
        EvaluationError: there are none.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    advice = (
        f"{needs} validation data, never by what is tested. Give Trainer.test a datamodule whose setup('test') "
        "prepares val_dataloader() as well, define val_dataloader() in the module, or do it at the end of a fit"
    )
    if not loop._data_source.is_defined():
        raise EvaluationError(f"this test run has no validation dataloader: {advice}")
    try:
        with quiet():
            loop.setup_data()
    except Exception as error:
        raise EvaluationError(
            f"the validation dataloader could not be had in this test run ({quoted(error)}): {advice}"
        ) from error
    if not dataloaders(trainer, "validate"):
        raise EvaluationError(f"the validation dataloader of this test run is empty: {advice}")
