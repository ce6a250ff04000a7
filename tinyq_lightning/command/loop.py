"""A Trainer that runs a loop of the user's for a command: one process, nothing written, nothing shown but progress."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tinyq_lightning.errors import EvaluationError, quoted
from tinyq_lightning.namespaces import namespace_of, refuse_other_namespace

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule

__all__ = [
    "STEPS",
    "made_data",
    "run_loop",
]

STEPS = {"test": "test", "validate": "validation"}
"""The loops that a command runs, and what their steps are called after."""


def made_data(data_class: Any, name: str, arguments: Mapping[str, Any]) -> LightningDataModule:
    """A data module.

    Raises:
        EvaluationError: the class cannot be called with the arguments.
    """
    try:
        data: LightningDataModule = data_class(**arguments)
    except Exception as error:
        raise EvaluationError(f"{name} could not be made: {quoted(error)}") from error
    return data


def run_loop(
    module: LightningModule,
    data: LightningDataModule,
    loop: str,
    of: str,
    *,
    accelerator: str = "cpu",
    limit: float | None = None,
    shows: bool = True,
) -> dict[str, float]:
    """What a loop logs.

    Args:
        module: the module.
        data: its data.
        loop: ``validate`` or ``test``.
        of: what is run, for the error.
        accelerator: as of the Trainer.
        limit: on the batches, as of the Trainer; None for all.
        shows: whether a bar is shown on a terminal.

    Raises:
        EvaluationError: the loop failed.
        ModelError: module and data are of different packages.
    """
    refuse_other_namespace(module, type(data))
    pytorch = namespace_of(module).pytorch
    # not before its import, which sets the level: without what a Trainer tells of devices, and its tips
    logging.getLogger(pytorch.__name__).setLevel(logging.ERROR)
    limits: dict[str, Any] = {f"limit_{'val' if loop == 'validate' else 'test'}_batches": limit}
    try:
        trainer = pytorch.Trainer(
            accelerator=accelerator,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=sys.stderr.isatty() and shows,
            **limits,
        )
        logged = getattr(trainer, loop)(module, datamodule=data, verbose=False)
    except Exception as error:
        raise EvaluationError(f"{of}: the {STEPS[loop]} loop could not be run: {quoted(error)}") from error
    return {name: float(value) for each in logged for name, value in each.items()}
