"""All that needs a Trainer: the user's loop run on other weights, which float weights, checks before training."""

from tinyq_lightning.trainer.before_fit import check_before_fit
from tinyq_lightning.trainer.checks import (
    check_budget,
    refuse_mixed_packages,
    warn_of_no_limit,
    warn_of_worst_checkpoint,
)
from tinyq_lightning.trainer.evaluation import validation_data_lent
from tinyq_lightning.trainer.exports import export_beside_file
from tinyq_lightning.trainer.failures import step_after_run, tell_of_interrupt, tell_of_quantized_layers
from tinyq_lightning.trainer.float_weights import (
    FloatWeights,
    choose_float_weights,
    files_before_fit,
    tested_weights,
)
from tinyq_lightning.trainer.holds_run import HoldsRun
from tinyq_lightning.trainer.hyper_parameters import with_removed_hyper_parameters
from tinyq_lightning.trainer.isolation import preserved
from tinyq_lightning.trainer.launched import return_to_main_process
from tinyq_lightning.trainer.methods_run import Measured, MethodsRun
from tinyq_lightning.trainer.quantized_start import QuantizedStart
from tinyq_lightning.trainer.ranks import is_sharded, refuse_sharding, write_on_rank_zero
from tinyq_lightning.trainer.results import Results, compare, numbers
from tinyq_lightning.trainer.saving import save_quantized
from tinyq_lightning.trainer.sharded import QuantizedShards, quantize_sharded
from tinyq_lightning.trainer.test_run import TestRun, at_test_epoch_end, forget_test_start, note_test_start

__all__ = [
    "FloatWeights",
    "HoldsRun",
    "Measured",
    "MethodsRun",
    "QuantizedShards",
    "QuantizedStart",
    "Results",
    "TestRun",
    "at_test_epoch_end",
    "check_before_fit",
    "check_budget",
    "choose_float_weights",
    "compare",
    "export_beside_file",
    "files_before_fit",
    "forget_test_start",
    "is_sharded",
    "note_test_start",
    "numbers",
    "preserved",
    "quantize_sharded",
    "refuse_mixed_packages",
    "refuse_sharding",
    "return_to_main_process",
    "save_quantized",
    "step_after_run",
    "tell_of_interrupt",
    "tell_of_quantized_layers",
    "tested_weights",
    "validation_data_lent",
    "warn_of_no_limit",
    "warn_of_worst_checkpoint",
    "with_removed_hyper_parameters",
    "write_on_rank_zero",
]
