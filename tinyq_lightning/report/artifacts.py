"""Gives the files of a run to the loggers that take artifacts: MLflow and Weights & Biases."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from tinyq_lightning.report.files import files_of_report
from tinyq_lightning.report.outcome import Outcome

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "log_artifacts",
]

_FOLDER = "tinyq"


def log_artifacts(trainer: Trainer, outcomes: Sequence[Outcome]) -> None:
    """Log each checkpoint with its exports and the files of its report, on rank 0.

    In MLflow they are artifacts of the run below ``tinyq/``, in Weights & Biases an artifact of the type ``model`` for
    each checkpoint. Files at a URL are left out. A warning says if no logger takes any.
    """
    if not trainer.is_global_zero:
        return
    found = {each.own_path: _files(each) for each in outcomes if each.own_path}
    taken = [_log(logger, path, files) for logger in trainer.loggers for path, files in found.items()]
    if found and not any(taken):
        names = ", ".join(type(logger).__name__ for logger in trainer.loggers) or "there is none"
        rank_zero_warn(f"TinyQ: log_files=True, and no logger of the run takes files as MLflow's does: {names}")


def _files(outcome: Outcome) -> list[str]:
    path = str(outcome.quantized_path)
    exports = [file for export in outcome.exports for file in export.files]
    return [each for each in (path, *exports, *files_of_report(path)) if os.path.isfile(each)]


def _log(logger: Any, path: str, files: Sequence[str]) -> bool:
    """Return True if the logger has taken the files."""
    experiment: Any = getattr(logger, "experiment", None)
    if callable(getattr(experiment, "log_artifact", None)) and getattr(logger, "run_id", None):  # MLflow
        for file in files:
            experiment.log_artifact(logger.run_id, file, _FOLDER)
        return True
    if callable(getattr(logger, "log_table", None)) and callable(getattr(experiment, "log_artifact", None)):  # W&B
        import wandb

        stem = os.path.basename(path).removesuffix(".ckpt")
        artifact = wandb.Artifact(name=f"{_FOLDER}-{re.sub('[^a-zA-Z0-9_.-]', '-', stem)}", type="model")
        for file in files:
            artifact.add_file(file)
        experiment.log_artifact(artifact)
        return True
    return False
