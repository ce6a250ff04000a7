"""One self-contained HTML page: no network, light and dark, readable on a phone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from tinyq_lightning.table import format_bytes

__all__ = [
    "html_report",
]


def html_report(content: Mapping[str, Any], resolved: str) -> str:
    """The page.

    Args:
        content: of :func:`tinyq_lightning.report.files.report_content`.
        resolved: the spec that was resolved, as YAML.
    """
    page = Template(resources.files("tinyq_lightning.report").joinpath("page.html").read_text(encoding="utf-8"))
    name = content["quantized_checkpoint"] or content["label"]
    return page.substitute(
        title=escape(f"{name} · TinyQ report"),
        heading=escape(name),
        lead=_lead(content),
        comparison=_comparison(content),
        sizes=_sizes(content["bytes"]),
        search=_search(content["budget"]) if content["budget"] else "",
        errors=_errors(content["layers"], content["spec"]["method"]),
        layers=_layers(content["layers"]),
        resolved=escape(resolved),
        version=escape(content["tinyq_lightning"]),
    )


def _lead(content: Mapping[str, Any]) -> str:
    layers = content["layers"]
    count = sum(layer["method"] != "float" for layer in layers)
    source = f"{content['note']} {content['float_checkpoint'] or ''}".strip()
    text = f"<p>{count} of {len(layers)} Linear layers in int8 ({escape(content['label'])}), from {escape(source)}.</p>"
    if verdict := content["verdict"]:
        kind = "met" if content["budget"]["met"] else "missed"
        text += f'<p class="verdict {kind}">{escape(verdict[0].upper() + verdict[1:])}.</p>'
    if found := content["never_slower"]:
        text += f"<p>{escape(found['verdict'][0].upper() + found['verdict'][1:])}.</p>"
    return text


def _comparison(content: Mapping[str, Any]) -> str:
    methods = [name for name in content["bytes"] if name != "float"]
    head = ["", "float", *(title for name in methods for title in (name, "change"))]
    rows = []
    for metric, values in content["metrics"].items():
        row = [metric, _number(values["float"])]
        for name in methods:
            delta = values.get("delta" if len(methods) == 1 else f"delta/{name}")
            row += [_number(values.get(name)), _number(delta, "+.3g")]
        rows.append(row)
    before = content["bytes"]["float"]
    row = ["weights", format_bytes(before)]
    for name in methods:
        row += [format_bytes(content["bytes"][name]), _share(content["bytes"][name], before)]
    rows.append(row)
    seconds = content["seconds_per_batch"]
    if seconds["float"]:
        row = ["ms per batch", _number(1000 * seconds["float"], ".3g")]
        for name in methods:
            now = seconds[name]
            row += [_number(now and 1000 * now, ".3g"), _share(now, seconds["float"]) if now else "–"]
        rows.append(row)
    return _table(head, rows)


def _share(now: float, before: float) -> str:
    return f"{now / before - 1:+.0%}".replace("-", "−") if before else "–"


def _number(value: float | None, spec: str = ".6g") -> str:
    return "–" if value is None else format(value, spec).replace("-", "−")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        shown = (f"<{tag}{' class=left' * (i < left)}>{escape(cell)}</{tag}>" for i, cell in enumerate(cells))
        return f"<tr>{''.join(shown)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table><thead>{line(head, "th")}</thead><tbody>{body}</tbody></table></div>'


def _bar(share: float, kind: str) -> str:
    """A bar as wide as its cell, filled to ``share`` of it."""
    width = 100 * max(0.0, min(1.0, share))
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="10"/><rect class="{kind}" width="{width:.2f}" height="10"/></svg>'
    )


def _sizes(sizes: Mapping[str, int]) -> str:
    whole = max(sizes.values()) or 1
    rows = (
        _bar_row(escape(name), size / whole, "float" if name == "float" else "int8", format_bytes(size))
        for name, size in sizes.items()
    )
    return f'<div class="bars">{"".join(rows)}</div>'


def _bar_row(name: str, share: float, kind: str, value: str) -> str:
    return f"<div><span>{name}</span>{_bar(share, kind)}<span>{value}</span></div>"


def _errors(layers: Sequence[Mapping[str, Any]], asked: str) -> str:
    """Layer errors, the largest first: of the outputs where they were measured, else of the weights."""
    measured = any(layer.get("output_sqnr_db") for layer in layers)
    found = []
    for layer in layers:
        given_up = layer["method"] == "float" and layer["reason"].startswith("budget")
        method = asked if given_up else layer["method"]
        sqnr = layer.get("output_sqnr_db", {}).get(method) if measured else layer["weight_sqnr_db"]
        if method != "float" and sqnr is not None:
            found.append((10 ** (-sqnr / 20), sqnr, f"{method}, now float" if given_up else method, layer))
    if not found:
        return "<p>No layer's error was measured.</p>"
    found.sort(key=lambda each: -each[0])
    whole = min(1.0, found[0][0])
    rows = [
        _bar_row(
            f"{escape(layer['name'])} <small>{escape(method)}</small>",
            error / whole,
            "float" if layer["method"] == "float" else "error",
            f"{_percent(error)} <small>{_number(sqnr, '.1f')} dB</small>",
        )
        for error, sqnr, method, layer in found
    ]
    what = (
        "Error of each layer's output on the first batches, relative to how much that output varies"
        if measured
        else "Error of each layer's weight, relative to the weight"
    )
    return f'<p>{what}; the largest first. 1 % is an SQNR of 40 dB.</p><div class="bars wide">{"".join(rows)}</div>'


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _layers(layers: Sequence[Mapping[str, Any]]) -> str:
    head = ["layer", "method", "reason", "kernel", "weight SQNR dB", "float", "now"]
    full = any(layer.get("output_sqnr_db") for layer in layers)
    rows = []
    for layer in layers:
        sizes = [format_bytes(layer["float_bytes"]), format_bytes(layer["bytes"])]
        kernel = layer["kernel"]["label"] if layer["kernel"] else ""
        row = [layer["name"], layer["method"], layer["reason"], kernel]
        row += [_number(layer["weight_sqnr_db"], ".1f"), *sizes]
        if full:
            own = layer.get("output_sqnr_db", {}).get(layer["method"])
            now = layer.get("ms", {}).get(layer["method"], layer.get("float_ms"))
            row += [_number(own, ".1f"), _number(layer.get("crest"), ".1f")]
            row += [_number(layer.get("float_ms"), ".3g"), _number(now, ".3g")]
        rows.append(row)
    return _table([*head, *(["output SQNR dB", "crest", "float ms", "ms"] if full else [])], rows, left=4)


def _search(budget: Mapping[str, Any]) -> str:
    """What each plan of the search lost, over what it gave up: bytes, or layers where none gave up bytes."""
    trials, allowed = budget["trials"], budget["allowed"]
    if len(trials) == 1:
        return ""  # within the budget as asked for: nothing was searched
    in_bytes = any(trial["extra_bytes"] for trial in trials)
    points = [
        (trial["extra_bytes"] if in_bytes else len(trial["changes"]), trial["lost"], index)
        for index, trial in enumerate(trials)
        if trial["lost"] is not None
    ]
    axis = "bytes given up" if in_bytes else "layers given up"
    rows = [
        [
            str(index + 1) + (" ← chosen" if index == budget["chosen"] else ""),
            str(len(trial["changes"])),
            format_bytes(trial["extra_bytes"]),
            _number(trial["value"]),
            _number(trial["lost"], ".3g"),
            "yes" if trial["lost"] is not None and trial["lost"] <= allowed else "no",
        ]
        for index, trial in enumerate(trials)
    ]
    table = _table(["plan", "layers given up", "bytes given up", budget["monitor"], "lost", "within"], rows)
    chart = _curve(points, allowed, budget["chosen"], axis, f"{budget['monitor']} lost") if points else ""
    return (
        "<section><h2>The search</h2>"
        f"<p>Each dot is a plan that was measured with the whole validation loop. Those below the line keep "
        f"{escape(budget['monitor'])} within {allowed:.4g} of float.</p>{chart}{table}</section>"
    )


def _curve(points: Sequence[tuple[float, float, int]], allowed: float, chosen: int, x_name: str, y_name: str) -> str:
    width, height, left, right, top, bottom = 360, 230, 68, 12, 24, 40
    most = max(x for x, _, _ in points) or 1
    highest = max(allowed, *(y for _, y, _ in points), 1e-12)
    high = 1.08 * highest
    low = min(0.0, *(y for _, y, _ in points))

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + 8 + (width - left - right - 16) * x / most
        return across, top + (height - top - bottom) * (high - y) / (high - low)

    y_line = at(0, allowed)[1]
    base = height - bottom
    parts = [
        f'<path class="within" d="M{left} {y_line:.1f}H{width - right}V{base}H{left}Z"/>',
        f'<path class="axis" d="M{left} {top}V{base}H{width - right}"/>',
        f'<path class="limit" d="M{left} {y_line:.1f}H{width - right}"/>',
        f'<text x="{left - 5}" y="{at(0, highest)[1] + 4:.1f}" class="end">{highest:.3g}</text>',
        f'<text x="{left - 5}" y="{base + 4}" class="end">{_number(low, ".2g")}</text>',
        f'<text x="{left}" y="{base + 15}">0</text>',
        f'<text x="{width - right}" y="{base + 15}" class="end">'
        f"{format_bytes(most) if x_name.startswith('bytes') else most}</text>",
        f'<text x="{(left + width - right) / 2}" y="{height - 6}" class="middle">{x_name}</text>',
        f'<text x="4" y="{top - 11}">{escape(y_name)}</text>',
        f'<text x="{width - right}" y="{y_line - 4:.1f}" class="end">allowed {allowed:.3g}</text>',
    ]
    frontier = _frontier(points)
    if len(frontier) > 1:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (at(x, y) for x, y, _ in frontier))
        parts.append(f'<path class="frontier" d="M{path}"/>')
    for x, y, index in sorted(points, key=lambda point: point[2] == chosen):
        cx, cy = at(x, y)
        kind, radius = ("chosen", 6) if index == chosen else ("trial", 4)
        shown = f"plan {index + 1}: lost {y:.4g}"
        parts.append(f'<circle class="{kind}" cx="{cx:.1f}" cy="{cy:.1f}" r="{radius}"><title>{shown}</title></circle>')
    label = f"{y_name} over {x_name}, one dot for each plan of the search"
    opening = f'<svg class="curve" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
    return f"{opening}{''.join(parts)}</svg>"


def _frontier(points: Sequence[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """The plans that no other beats on both axes, from the left."""
    kept: list[tuple[float, float, int]] = []
    for point in sorted(points):
        if point[1] < (kept[-1][1] if kept else math.inf):
            kept.append(point)
    return kept
