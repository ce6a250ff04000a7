"""The outcome of a run on the screen, in the loggers, and in files beside the checkpoint."""

from tinyq_lightning.report.console import log_outcomes, log_tables, show, warn
from tinyq_lightning.report.files import write_report
from tinyq_lightning.report.outcome import Outcome, combined, log_entries, outcome_of_fit, outcome_of_test
from tinyq_lightning.report.summary import QuantizedModelSummary, summarize

__all__ = [
    "Outcome",
    "QuantizedModelSummary",
    "combined",
    "log_entries",
    "log_outcomes",
    "log_tables",
    "outcome_of_fit",
    "outcome_of_test",
    "show",
    "summarize",
    "warn",
    "write_report",
]
