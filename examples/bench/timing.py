"""Calls that take turns, so that a machine's moods meet all of them, and what their times say."""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from tinyq_lightning.table import Table


def rounds(calls: Mapping[str, Callable[[], object]], seconds: float, count: int) -> dict[str, list[float]]:
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
            start = time.perf_counter()
            for _ in range(loops[name]):
                call()
            taken[name].append((time.perf_counter() - start) / loops[name])
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
) -> list[dict]:
    """One cell for each call: its error, its time, and the time of another (``over``) over that; or why it failed."""
    cells: dict[str, dict] = {}
    for name, call in calls.items():
        try:
            cells[name] = {"contender": name, "error": relative_error(call(), wanted[name])}
        except Exception as failure:  # that a peer cannot run a shape is a result
            cells[name] = {"contender": name, "failed": f"{type(failure).__name__}: {failure}".splitlines()[0]}
    running = {name: call for name, call in calls.items() if "failed" not in cells[name]}
    taken = rounds(running, args.seconds, args.rounds)
    for name, times in taken.items():
        cells[name]["seconds"] = statistics.median(times)
        base = over.get(name, "float32")
        if base in taken:
            ratios = [other / own for other, own in zip(taken[base], times, strict=True)]
            cells[name] |= {"over": base, "ratio": statistics.median(ratios), "spread": spread(ratios)}
    return list(cells.values())


def show(place: str, cells: Sequence[dict]) -> None:
    """One line of progress, on standard error."""
    figures = (f"{cell['contender']} {cell['ratio']:.2f}" for cell in cells if "ratio" in cell)
    print(place, *figures, sep="  ", file=sys.stderr, flush=True)


def summary(cells: Sequence[dict]) -> Table:
    """Contenders × columns: geometric mean (worst … best) of the ratios; last, median spread and median error."""
    done = [cell for cell in cells if "ratio" in cell]
    columns = list(dict.fromkeys(cell["column"] for cell in done))
    rows = []
    for name in dict.fromkeys(cell["contender"] for cell in done):
        own = [cell for cell in done if cell["contender"] == name]
        means = (_mean([cell["ratio"] for cell in own if cell["column"] == column]) for column in columns)
        middle = {key: statistics.median(cell[key] for cell in own) for key in ("spread", "error")}
        rows.append([name, *means, f"±{middle['spread']:.0%}", f"{middle['error']:.1e}"])
    return Table(["", *columns, "spread", "error"], rows)


def _mean(ratios: Sequence[float]) -> str:
    if not ratios:
        return "–"
    low, high = min(ratios), max(ratios)
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    return f"{mean:.2f} ({low:.2f} … {high:.2f})" if low < high else f"{mean:.2f}"
