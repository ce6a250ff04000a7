"""The outcome of a run on the screen, in the loggers, and in files beside the checkpoint."""

from tinyq_lightning.report.outcome import (
    Outcome,
    column_name,
    combined,
    log_entries,
    outcome_of_fit,
    outcome_of_shards,
    outcome_of_test,
    quantized_content,
)
from tinyq_lightning.report.steps import report_steps
from tinyq_lightning.report.summary import QuantizedModelSummary, summarize

__all__ = [
    "Outcome",
    "QuantizedModelSummary",
    "column_name",
    "combined",
    "log_entries",
    "outcome_of_fit",
    "outcome_of_shards",
    "outcome_of_test",
    "quantized_content",
    "report_steps",
    "summarize",
]
