"""The one timer: how long a call takes, and float beside quantized with the two taking turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from tinyq_lightning.errors import quoted

__all__ = [
    "BatchTimes",
    "Run",
    "Timing",
    "brief",
    "evaluating",
    "time_in_turns",
    "timed",
    "waiting_for",
]

Returned = TypeVar("Returned")


Run = Callable[[], Any]


class Timing(NamedTuple):
    """The time of one call, with float and with quantized layers.

    Attributes:
        float_ms: median with float layers, in milliseconds.
        ms: the same with quantized layers.
    """

    float_ms: float
    ms: float


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Context manager in which modules are in eval mode, and everything below them; then in the modes they had.

    A layer that is not in the model at present may be in another mode than the model. In training mode a recurrent
    layer drops values at random, and a spectral norm changes.
    """
    below = [each for module in modules for each in module.modules()]
    modes = [each.training for each in below]
    try:
        for each in below:
            each.training = False
        yield
    finally:
        for each, mode in zip(below, modes, strict=True):
            each.training = mode


@dataclass(frozen=True)
class BatchTimes:
    """The time of a batch in one run of a loop, without its first batch, which warms up caches and kernels.

    Attributes:
        seconds: median; NaN where there is no batch.
        spread: half the distance between the quartiles: half of the batches are within ``seconds ± spread``.
        batches: how many were timed.
    """

    seconds: float = math.nan
    spread: float = math.nan
    batches: int = 0

    @classmethod
    def of(cls, seconds: Sequence[float]) -> BatchTimes:
        """From the seconds of each batch, in their order."""
        warm = seconds[1:]
        if len(warm) < 2:
            return cls(median(warm or seconds), 0.0, len(warm)) if seconds else cls()
        lower, middle, upper = quantiles(warm, n=4, method="inclusive")
        return cls(middle, (upper - lower) / 2, len(warm))


def timed(run: Callable[[], Returned], device: torch.device | str = "cpu") -> tuple[Returned, float]:
    """What ``run`` returns, and the seconds that it took.

    Args:
        run: the call.
        device: the device that it computes on; its queue is waited for before and after the call.
    """
    wait = waiting_for(device)
    wait()
    start = time.perf_counter()
    returned = run()
    wait()
    return returned, time.perf_counter() - start


def waiting_for(device: torch.device | str) -> Callable[[], object]:
    """What returns when a device has done all that it was asked for: at once on a CPU, which does it in the call."""
    kind = torch.device(device).type
    if kind == "cuda":
        return partial(torch.cuda.synchronize, device)
    return _nothing if kind in ("cpu", "meta") else getattr(torch, kind).synchronize


def _nothing() -> None:
    return None


def time_in_turns(
    pairs: Sequence[tuple[Run, Run]], more: Callable[[int], bool], device: torch.device | str = "cpu"
) -> Timing:
    """Medians over all pairs and rounds.

    Float and quantized take turns call by call, so that a change of the machine's load or clock meets both.

    Args:
        pairs: calls with float and with quantized layers.
        more: given the number of rounds so far, returns whether there is another. A round is each call of
            each pair once.
        device: as for :func:`timed`.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    rounds = 0
    while more(rounds):
        for pair in pairs:
            for run, taken in zip(pair, seconds, strict=True):
                taken.append(timed(run, device)[1])
        rounds += 1
    return Timing(1000 * median(seconds[0]), 1000 * median(seconds[1]))


def brief(error: Exception) -> str:
    """An error in one line of a table, for a call that could not be timed or measured."""
    first = quoted(error).splitlines()[0]
    return first if len(first) <= 160 else f"{first[:159]}…"
