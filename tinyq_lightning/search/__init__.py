"""What is decided from measurements: the budget's search, layer errors, timings, calibration; without Lightning."""

from tinyq_lightning.search.budget import Changes, Search, SearchedLayer, evaluation_limit, loses, search
from tinyq_lightning.search.calibration import calibrate, why_of_no_use
from tinyq_lightning.search.layer_errors import SIGNAL_BATCHES, LayerError, measured_layers
from tinyq_lightning.search.quantizing import is_one_input, quantize
from tinyq_lightning.search.timer import BatchTimes, Timing, evaluating, time_in_turns, waiting_for
from tinyq_lightning.search.timing import Stopwatch

__all__ = [
    "SIGNAL_BATCHES",
    "BatchTimes",
    "Changes",
    "LayerError",
    "Search",
    "SearchedLayer",
    "Stopwatch",
    "Timing",
    "calibrate",
    "evaluating",
    "evaluation_limit",
    "is_one_input",
    "loses",
    "measured_layers",
    "quantize",
    "search",
    "time_in_turns",
    "waiting_for",
    "why_of_no_use",
]
