"""Calls that take turns, so that a machine's moods meet all of them, and what their times say."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor


def rounds(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    count: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds that one call takes, in each of ``count`` rounds; ``seconds`` is the time each call gets in all."""
    loops = {}
    for name, call in calls.items():
        call(), call()
        start = time.perf_counter()
        call()
        loops[name] = max(1, int(seconds / count / max(time.perf_counter() - start, 1e-7)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(count):
        for name, call in calls.items():
            start = clock()
            for _ in range(loops[name]):
                call()
            taken[name].append((clock() - start) / loops[name])
    return taken


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles, as a share of the median."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def compare(
    calls: Mapping[str, Callable[[], Tensor]],
    wanted: Mapping[str, Tensor],
    over: Mapping[str, str],
    args: argparse.Namespace,
    kernels: Mapping[str, str],
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict]:
    """One cell for each call: its error, its time, and the time of another (``over``) over that; or why it failed."""
    cells: dict[str, dict] = {}
    for name, call in calls.items():
        try:
            error = relative_error(call(), wanted[name])
            cells[name] = {"contender": name, "kernel": kernels[name], "error": error}
        except Exception as failure:  # that a peer cannot run a shape is a result
            cells[name] = {"contender": name, "failed": f"{type(failure).__name__}: {failure}".splitlines()[0]}
    running = {name: call for name, call in calls.items() if "failed" not in cells[name]}
    taken = rounds(running, args.seconds, args.rounds, clock)
    for name, times in taken.items():
        cells[name]["seconds"] = statistics.median(times)
        base = over.get(name, "float32")
        if base in taken:
            ratios = [other / own for other, own in zip(taken[base], times, strict=True)]
            cells[name] |= {"over": base, "ratio": statistics.median(ratios), "spread": spread(ratios)}
    return list(cells.values())
