"""The tables of a report: metrics, sizes and times before and after, and the plan layer by layer."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace

from tinyq_lightning.plan import Decision, Plan, group_name, grouped
from tinyq_lightning.report.outcome import Outcome
from tinyq_lightning.search import BatchTimes
from tinyq_lightning.table import Table, format_bytes

__all__ = [
    "comparison_table",
    "export_table",
    "kind_table",
    "layer_table",
    "methods_table",
    "speed_advice",
]

# Times of fewer batches, besides the first, are left out: they say little.
_BATCHES = 4


def comparison_table(outcomes: Sequence[Outcome]) -> Table:
    """Metrics, sizes and the time of a batch: float, and each outcome with its difference."""
    first = outcomes[0]
    header = ["", "float", *(title for each in outcomes for title in (each.name, "delta"))]
    rows = []
    for metric, values in first.results.items():
        if not all(metric in each.results for each in outcomes):
            continue
        found = [each.results[metric] for each in outcomes]
        pairs = [(f"{row[each.name]:.6g}", f"{row['delta']:+.2g}") for each, row in zip(outcomes, found, strict=True)]
        rows.append([metric, f"{values['float']:.6g}", *(text for pair in pairs for text in pair)])
    sizes = [(each.bytes, each.float_bytes) for each in outcomes]
    rows.append(["weights", format_bytes(first.float_bytes), *_sizes(sizes)])
    paths = [(each.quantized_path, each.float_path) for each in outcomes]
    if all(path and os.path.isfile(path) for pair in paths for path in pair):
        on_disk = [(os.path.getsize(str(path)), os.path.getsize(str(float_path))) for path, float_path in paths]
        rows.append(["file on disk", format_bytes(on_disk[0][1]), *_sizes(on_disk)])
    times = [each.seconds for each in outcomes]
    if not any(map(_is_noise, (first.float_seconds, *times))):
        cells = [text for now in times for text in (_milliseconds(now), _change(now, first.float_seconds))]
        rows.append(["ms per batch", _milliseconds(first.float_seconds), *cells])
    return Table(header, rows, kept=2, step=2)


def _is_noise(times: BatchTimes) -> bool:
    """Whether a time tells nothing: of few batches, or of a machine that was busy with other work."""
    return times.batches < _BATCHES or times.spread > times.seconds / 3


def speed_advice(outcome: Outcome) -> str | None:
    """What to do where a batch takes a tenth longer than in float, beyond the noise; None elsewhere."""
    before, now = outcome.float_seconds, outcome.seconds
    if outcome.stopwatch is not None or _is_noise(before) or _is_noise(now) or not _change(now, before):
        return None
    if now.seconds < 1.1 * before.seconds:
        return None
    return "a batch takes longer than in float on this machine: never_slower=True leaves float what is slower quantized"


def _milliseconds(times: BatchTimes) -> str:
    """``2.1 ±0.1``, with one digit of the spread."""
    middle, spread = 1000 * times.seconds, 1000 * times.spread
    digits = min(6, max(0, -math.floor(math.log10(spread)))) if spread else 3
    return f"{middle:.{digits}f} ±{spread:.{digits}f}"


def _change(now: BatchTimes, before: BatchTimes) -> str:
    """In percent; empty where the two spreads overlap, since the difference may be noise."""
    if abs(now.seconds - before.seconds) <= now.spread + before.spread:
        return ""
    return f"{now.seconds / before.seconds - 1:+.0%}"


def _sizes(pairs: Sequence[tuple[int, int]]) -> list[str]:
    return [
        text
        for now, before in pairs
        for text in (format_bytes(now), f"{now / before - 1:+.1%}" if before else f"{0:+.1%}")
    ]


def kind_table(plan: Plan) -> Table:
    """For each kind of layer: how many are quantized, and what they take as floats and now."""
    rows = []
    for kind in dict.fromkeys(decision.kind for decision in plan):
        layers = [decision for decision in plan if decision.kind == kind]
        quantized = sum(decision.method != "float" for decision in layers)
        before, after = sum(each.float_bytes for each in layers), sum(each.bytes for each in layers)
        rows.append([kind, f"{quantized} of {len(layers)}", format_bytes(before), *_sizes([(after, before)])])
    return Table(["kind", "quantized", "float", "now", "delta"], rows)


def export_table(outcomes: Sequence[Outcome]) -> Table | None:
    """Size, error and time of each export, and the metrics of those that the user's loop was run on; None for none."""
    exports = [each for outcome in outcomes for each in outcome.exports]
    metrics = list(dict.fromkeys(name for each in exports for name in each.metrics))
    rows = [
        [
            os.path.basename(each.path),
            each.format,
            format_bytes(each.bytes),
            "" if each.relative_error is None else f"{each.relative_error:.2g}",
            "" if each.ms is None else f"{each.ms:.3g}",
            "" if each.model_ms is None else f"{each.model_ms:.3g}",
            *(f"{each.metrics[name]:.6g}" if name in each.metrics else "" for name in metrics),
        ]
        for each in exports
    ]
    return Table(["export", "format", "size", "error", "ms", "here ms", *metrics], rows, 2) if rows else None


def layer_table(outcome: Outcome) -> Table:
    """The plan and, where layers were measured on real batches, what was found."""
    table = outcome.plan.as_table()
    if not outcome.layers:
        return table
    rows = []
    for decision, row in zip(outcome.plan, table.rows, strict=False):  # the table's last row is the sum
        cells, error = list(row), outcome.layers.get(decision.name)
        if error is None:
            rows.append([*cells, "", "", "", ""])
        elif error.not_measured is not None:
            cells[table.header.index("reason")] += f"; not measured: {error.not_measured}"
            rows.append([*cells, "", "", "", ""])
        else:
            sqnr = error.output_sqnr_db.get(decision.method)
            now = error.float_ms if decision.method == "float" else error.ms.get(decision.method, math.nan)
            shown = "" if sqnr is None else f"{sqnr:.1f}"
            crest = "" if math.isnan(error.crest) else f"{error.crest:.1f}"
            rows.append([*cells, shown, crest, f"{error.float_ms:.3g}", "" if math.isnan(now) else f"{now:.3g}"])
    header = [*table.header, "output SQNR dB", "crest", "float ms", "ms"]
    return replace(table, header=header, rows=[*rows, [*table.rows[-1], "", "", "", ""]])


def methods_table(outcomes: Sequence[Outcome], group: bool = False) -> Table:
    """For each layer the SQNR by each method, of the outputs where all were measured on batches, else of the weights.

    A layer that a run gave another method has that before the figure.

    Args:
        outcomes: of several methods for one model.
        group: one row for the layers of the same decision whose names differ in numbers alone.
    """
    measured = all(each.layers for each in outcomes)
    first = outcomes[0].plan
    decisions = [{decision.name: decision for decision in each.plan} for each in outcomes]
    rows = []
    for alike in grouped(first) if group else [[decision] for decision in first]:
        found = [[of[each.name] for each in alike] for of in decisions]
        cells = [_sqnr_cell(one, outcome, measured) for one, outcome in zip(found, outcomes, strict=True)]
        rows.append([group_name(alike), *cells])
    return Table([f"layer: {'output ' * measured}SQNR dB", *(each.name for each in outcomes)], rows)


def _sqnr_cell(alike: Sequence[Decision], outcome: Outcome, measured: bool) -> str:
    """``45.2…47.1``, with the methods before it that are not the one of the column."""
    methods = dict.fromkeys(each.method for each in alike if each.method != (each.asked or outcome.plan.spec.method))
    if measured:
        errors = [(outcome.layers.get(each.name), each.method) for each in alike]
        found = [error.output_sqnr_db.get(method) for error, method in errors if error is not None]
    else:
        found = [each.weight_sqnr_db for each in alike]
    figures = [value for value in found if value is not None]
    ends = dict.fromkeys(f"{end(figures):.1f}" for end in (min, max)) if figures else {}
    return " ".join(filter(None, ["/".join(methods), "…".join(ends)]))
