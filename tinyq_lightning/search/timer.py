"""The one timer: how long a call takes, and float beside int8 with the two taking turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple, TypeVar

import torch

__all__ = [
    "Run",
    "Timing",
    "time_in_turns",
    "timed",
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


def timed(run: Callable[[], Returned], device: torch.device | str = "cpu") -> tuple[Returned, float]:
    """What ``run`` returns, and the seconds that it took.

    Args:
        run: the call.
        device: the device that it computes on; its queue is waited for before and after the call.
    """
    kind = torch.device(device).type
    wait = _nothing if kind in ("cpu", "meta") else getattr(torch, kind).synchronize
    wait()
    start = time.perf_counter()
    returned = run()
    wait()
    return returned, time.perf_counter() - start


def _nothing() -> None:
    return None


def time_in_turns(
    pairs: Sequence[tuple[Run, Run]], more: Callable[[int], bool], device: torch.device | str = "cpu"
) -> Timing:
    """Medians over all pairs and rounds.

    Float and int8 take turns call by call, so that a change of the machine's load or clock meets both.

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
