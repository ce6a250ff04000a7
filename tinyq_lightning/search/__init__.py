"""Decides which layers stay float: the budget's search, layer errors and timings. Nothing here needs Lightning."""

from tinyq_lightning.search.budget import LADDER, Changes, Search, SearchedLayer, evaluation_limit, loses, search
from tinyq_lightning.search.layer_errors import SIGNAL_BATCHES, LayerError, measured_layers
from tinyq_lightning.search.timer import BatchTimes, Timing, evaluating, time_in_turns
from tinyq_lightning.search.timing import Stopwatch

__all__ = [
    "LADDER",
    "SIGNAL_BATCHES",
    "BatchTimes",
    "Changes",
    "LayerError",
    "Search",
    "SearchedLayer",
    "Stopwatch",
    "Timing",
    "evaluating",
    "evaluation_limit",
    "loses",
    "measured_layers",
    "search",
    "time_in_turns",
]
