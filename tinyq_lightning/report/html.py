"""The report as one self-contained HTML page, readable in light and dark and on a phone.

The page itself is the jinja2 template ``page.html``; this file prepares what it shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from tinyq_lightning.report.curve import search_curve
from tinyq_lightning.table import Table, format_bytes

__all__ = [
    "html_report",
]


def html_report(content: Mapping[str, Any], tables: Mapping[str, Table], resolved: str) -> str:
    """The page.

    Args:
        content: of :func:`tinyq_lightning.report.files.report_content`.
        tables: ``comparison`` of metrics, sizes and times, before and after; ``kinds``, and ``layers`` one by one; and
            ``exports``, if there are any.
        resolved: the plan as a spec, in YAML.
    """
    template = resources.files("tinyq_lightning.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        name=content["quantized_checkpoint"] or content["label"],
        sentences=_sentences(content),
        tables=tables,
        sizes=_size_bars(content["bytes"]),
        search=_search(content["budget"]),
        errors=_errors(content["layers"], content["spec"]["method"]),
        resolved=resolved,
        machine=_machine(content),
    )


def _sentences(content: Mapping[str, Any]) -> list[dict[str, str]]:
    """The text under the title; ``kind`` is ``met`` or ``missed`` for a budget's verdict, else empty."""
    source = f"{content['note']} {content['float_checkpoint'] or ''}".strip()
    found = [{"text": f"{content['headline']}, from {source}", "kind": ""}]
    if content["verdict"]:
        found.append({"text": _capital(content["verdict"]), "kind": "met" if content["budget"]["met"] else "missed"})
    if content["never_slower"]:
        found.append({"text": _capital(content["never_slower"]["verdict"]), "kind": ""})
    if content["calibration"]:
        found.append({"text": _capital(content["calibration"]), "kind": ""})
    return found


def _machine(content: Mapping[str, Any]) -> str:
    """What the figures were measured on, in a sentence."""
    on = content["machine"]
    shown = [f"{on['processor']} ({on['instructions']}), {on['threads']} thread{'s' * (on['threads'] != 1)}"]
    shown += [on["gpu"]] if "gpu" in on else []
    if batches := max(content["batches_timed"].values()):
        shown.append(f"times of {batches} batches after the first")
    versions = [
        f"{name} {on[name]}" for name in ("torch", "lightning", "pytorch-lightning", "torchmetrics") if name in on
    ]
    return "; ".join([*shown, ", ".join([f"tinyq-lightning {content['tinyq_lightning']}", *versions])])


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _bar(name: str, share: float, kind: str, value: str, note: str = "", value_note: str = "") -> dict[str, str]:
    """A bar that is filled to ``share`` of its width."""
    width = f"{100 * max(0.0, min(1.0, share)):.2f}"
    return {"name": name, "note": note, "kind": kind, "width": width, "value": value, "value_note": value_note}


def _size_bars(sizes: Mapping[str, int]) -> list[dict[str, str]]:
    largest = max(sizes.values()) or 1
    return [
        _bar(name, size / largest, "float" if name == "float" else "int8", format_bytes(size))
        for name, size in sizes.items()
    ]


def _errors(layers: Sequence[Mapping[str, Any]], asked: str) -> dict[str, Any] | None:
    """Bars of the layers' errors, the largest first: of the outputs if they were measured, else of the weights."""
    measured = any(layer.get("output_sqnr_db") for layer in layers)
    found = []
    for layer in layers:
        given_up = layer["method"] == "float" and layer["decided_by"] == "budget"
        method = asked if given_up else layer["method"]
        sqnr = layer.get("output_sqnr_db", {}).get(method) if measured else layer["weight_sqnr_db"]
        if method != "float" and sqnr is not None:
            found.append((10 ** (-sqnr / 20), sqnr, f"{method}, now float" if given_up else method, layer))
    if not found:
        return None
    found.sort(key=lambda each: -each[0])
    largest = min(1.0, found[0][0])
    bars = [
        _bar(
            layer["name"],
            error / largest,
            "float" if layer["method"] == "float" else "error",
            _percent(error),
            method,
            f"{sqnr:.1f} dB".replace("-", "−"),
        )
        for error, sqnr, method, layer in found
    ]
    what = (
        "Error of each layer's output on the first batches, relative to how much that output varies"
        if measured
        else "Error of each layer's weight, relative to the weight"
    )
    return {"what": what, "bars": bars}


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _search(budget: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The plans that a search measured; None if it measured none beside the plan that was asked for."""
    if budget is None or len(budget["trials"]) == 1:
        return None
    allowed, monitor = budget["allowed"], budget["monitor"]
    rows = [
        [
            str(index + 1) + (" ← chosen" if index == budget["chosen"] else ""),
            str(len(trial["changes"])),
            format_bytes(trial["extra_bytes"]),
            "–" if trial["value"] is None else f"{trial['value']:.6g}",
            "–" if trial["lost"] is None else f"{trial['lost']:.3g}",
            "yes" if trial["lost"] is not None and trial["lost"] <= allowed else "no",
        ]
        for index, trial in enumerate(budget["trials"])
    ]
    table = Table(["plan", "layers changed", "more bytes", monitor, "lost", "within"], rows)
    return {"monitor": monitor, "allowed": f"{allowed:.4g}", "curve": search_curve(budget), "table": table}
