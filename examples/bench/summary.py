"""What many cells come to."""

import math
import statistics
import sys
from collections import Counter
from collections.abc import Sequence

from tinyq_lightning.table import Table


def show(place: str, cells: Sequence[dict]) -> None:
    """One line of progress, on standard error."""
    done = (cell for cell in cells if "ratio" in cell)
    figures = (
        f"{cell['contender']} {cell['ratio']:.2f}" + f" ({cell['kernel']})" * bool(cell["kernel"]) for cell in done
    )
    print(place, *figures, sep="  ", file=sys.stderr, flush=True)


def summary(cells: Sequence[dict]) -> Table:
    """Contenders × columns: geometric mean (worst … best) of the ratios; then median spread, median error, kernels.

    A contender that could not run all cells of a column is not comparable there: how many it ran is told.
    """
    done = [cell for cell in cells if "ratio" in cell]
    columns = list(dict.fromkeys(cell["column"] for cell in done))
    run = Counter((cell["contender"], cell["column"]) for cell in done)
    most = {column: max(count for (_, each), count in run.items() if each == column) for column in columns}
    rows = []
    for name in dict.fromkeys(cell["contender"] for cell in done):
        own = [cell for cell in done if cell["contender"] == name]
        means = [_mean([cell["ratio"] for cell in own if cell["column"] == column], most[column]) for column in columns]
        middle = {key: statistics.median(cell[key] for cell in own) for key in ("spread", "error")}
        kernels = ", ".join(sorted({cell["kernel"] for cell in own}))
        rows.append([name, *means, f"±{middle['spread']:.0%}", f"{middle['error']:.1e}", kernels])
    return Table(["", *columns, "spread", "error", "kernel"], rows)


def _mean(ratios: Sequence[float], most: int) -> str:
    if not ratios:
        return "–"
    low, high = min(ratios), max(ratios)
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    shown = f"{mean:.2f} ({low:.2f} … {high:.2f})" if low < high else f"{mean:.2f}"
    return shown if len(ratios) == most else f"{shown} in {len(ratios)} of {most}"
