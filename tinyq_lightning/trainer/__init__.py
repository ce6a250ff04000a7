"""All that needs a Trainer: the user's loop run on other weights, which float weights, checks before training."""

from tinyq_lightning.trainer.checks import check_monitor, known_mode, refuse_without_validation, why_never_validated
from tinyq_lightning.trainer.evaluation import directions, why_no_validation
from tinyq_lightning.trainer.float_weights import FloatWeights, choose_float_weights, tested_weights
from tinyq_lightning.trainer.isolation import preserved
from tinyq_lightning.trainer.methods_run import Measured, MethodsRun
from tinyq_lightning.trainer.quantized_start import QuantizedStart
from tinyq_lightning.trainer.ranks import refuse_sharding, write_on_rank_zero
from tinyq_lightning.trainer.results import Results, compare, numbers
from tinyq_lightning.trainer.test_run import TestRun, note_test_start

__all__ = [
    "FloatWeights",
    "Measured",
    "MethodsRun",
    "QuantizedStart",
    "Results",
    "TestRun",
    "check_monitor",
    "choose_float_weights",
    "compare",
    "directions",
    "known_mode",
    "note_test_start",
    "numbers",
    "preserved",
    "refuse_sharding",
    "refuse_without_validation",
    "tested_weights",
    "why_never_validated",
    "why_no_validation",
    "write_on_rank_zero",
]
