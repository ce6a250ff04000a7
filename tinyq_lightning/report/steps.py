"""The steps that tell of a run, one after the other, each of which may fail alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from tinyq_lightning.report.artifacts import log_artifacts
from tinyq_lightning.report.console import log_outcomes, log_tables, show, warn
from tinyq_lightning.report.files import write_report
from tinyq_lightning.report.outcome import Outcome

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "report_steps",
]


def report_steps(
    fitting: bool, alone: bool, report: bool, log_files: bool = False
) -> list[tuple[str, Callable[[Trainer, Sequence[Outcome]], None]]]:
    """Each step with its name for an error.

    Args:
        fitting: whether it was a fit; after a test the module has logged the results.
        alone: whether no other callback of the run has logged a ``…/delta``.
        report: whether to show, log and write the report.
        log_files: whether to give the files that were written to the loggers.
    """
    steps: list[tuple[str, Callable[[Trainer, Sequence[Outcome]], None]]] = []
    if fitting:
        steps.append(("Logging the results", partial(log_outcomes, alone=alone)))
    steps.append(("Warning of the outcome", warn))
    if report:
        steps += [("Showing the report", show), ("Logging tables", log_tables), ("Writing the report", write_report)]
    if log_files:
        steps.append(("Logging the files", log_artifacts))
    return steps
