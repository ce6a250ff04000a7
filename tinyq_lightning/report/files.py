"""Writes the report beside the checkpoint: JSON for programs, HTML for people, and the plan as a spec in YAML."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain, count
from typing import TYPE_CHECKING, Any

import fsspec
import yaml

from tinyq_lightning.errors import CheckpointError
from tinyq_lightning.file import file_exists, replace_file
from tinyq_lightning.handover import ExportReport
from tinyq_lightning.report.html import html_report
from tinyq_lightning.report.machine import machine
from tinyq_lightning.report.outcome import Outcome, combined
from tinyq_lightning.report.tables import comparison_table, export_table, kind_table, layer_table
from tinyq_lightning.trainer import write_on_rank_zero
from tinyq_lightning.version import __version__

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "files_of_report",
    "report_content",
    "resolved_yaml",
    "write_report",
]


def write_report(trainer: Trainer, outcomes: Sequence[Outcome]) -> None:
    """Write ``.json``, ``.html`` and ``.yaml`` beside each quantized checkpoint, on rank 0.

    Raises:
        CheckpointError: on every rank, if a file could not be written; the checkpoints are written already.
    """
    write_on_rank_zero(trainer, partial(_write, outcomes))


def _write(outcomes: Sequence[Outcome]) -> None:
    try:
        for outcome in outcomes:
            if outcome.own_path is not None:
                stem, content = _stem_of_report(outcome.own_path), report_content(outcome, outcomes)
                resolved = resolved_yaml(outcome, os.path.basename(stem))
                _write_text(f"{stem}.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
                _write_text(f"{stem}.yaml", resolved)
                tables = {
                    "comparison": comparison_table(outcomes),
                    "kinds": kind_table(outcome.plan),
                    "layers": layer_table(outcome),
                }
                if (exports := export_table([outcome])) is not None:
                    tables["exports"] = exports
                page = html_report(content, tables, resolved)
                _write_text(f"{stem}.html", page)
    except CheckpointError as error:
        raise CheckpointError(f"the report is not whole, the quantized checkpoint stands: {error}") from error


# What a file of a report begins with; the page's title comes after the name of the run.
_BEGINNINGS = {
    ".json": re.compile(r'\{\s*"format_version": 1,\s*"tinyq_lightning": '),
    ".yaml": re.compile(r"# The plan of .* as a spec\."),
    ".html": re.compile(r"\s*<!doctype html>.*TinyQ report</title>", re.DOTALL | re.IGNORECASE),
}


def _stem_of_report(quantized_path: str) -> str:
    """The checkpoint's path without ``.ckpt``, or with ``-report`` where that would replace a file of the user's."""
    stem = quantized_path.removesuffix(".ckpt")
    numbered = (f"{stem}-report-v{version}" for version in count(1))
    return next(each for each in chain((stem, f"{stem}-report"), numbered) if _is_free(each))


def files_of_report(quantized_path: str) -> list[str]:
    """The paths of the files that :func:`write_report` has written for a checkpoint."""
    stem = _stem_of_report(quantized_path)
    return [path for ending in _BEGINNINGS if file_exists(path := f"{stem}{ending}")]


def _is_free(stem: str) -> bool:
    """Whether each file of a report is absent or one of an earlier report."""
    for ending, beginning in _BEGINNINGS.items():
        fs, location = fsspec.core.url_to_fs(stem + ending)
        if fs.isfile(location) and not beginning.match(fs.cat_file(location, 0, 5000).decode("utf-8", "replace")):
            return False
    return True


def _write_text(path: str, text: str) -> None:
    replace_file(path, lambda file: file.write(text.encode("utf-8")))


def report_content(outcome: Outcome, outcomes: Sequence[Outcome] = ()) -> dict[str, Any]:
    """The report as plain data, for JSON. Numbers that are not finite are None; sizes are in bytes.

    Args:
        outcome: what the report is about.
        outcomes: all methods of the run, for the comparison.
    """
    plan, found = outcome.plan, outcome.search
    methods = outcomes or [outcome]
    times = {"float": outcome.float_seconds} | {each.name: each.seconds for each in methods}
    layers = []
    for decision, row in zip(plan, plan.to_list(), strict=True):
        error = outcome.layers.get(decision.name)
        kernel = decision.kernel and {"label": decision.kernel.label} | asdict(decision.kernel)
        layers.append(row | {"decided_by": decision.decided_by, "kernel": kernel} | (asdict(error) if error else {}))
    budget: dict[str, Any] | None = None
    if plan.spec.budget and found:
        budget = asdict(plan.spec.budget) | {
            "allowed": found.allowed,
            "met": found.met,
            "stopped_by": found.stopped_by,
            "trials": [asdict(trial) for trial in found.trials],
            "chosen": found.chosen,
        }
    content = {
        "format_version": 1,
        "tinyq_lightning": __version__,
        "machine": machine(),
        "method": outcome.name,
        "label": plan.label,
        "headline": str(outcome.coverage),
        "note": outcome.note,
        "float_checkpoint": outcome.float_path and os.path.basename(outcome.float_path),
        "quantized_checkpoint": outcome.quantized_path and os.path.basename(outcome.quantized_path),
        "metrics": combined(methods),
        "bytes": {"float": outcome.float_bytes} | {each.name: each.bytes for each in methods},
        "weight_bytes": {"quantized": outcome.coverage.quantized_bytes, "float": outcome.coverage.float_bytes},
        "seconds_per_batch": {name: each.seconds for name, each in times.items()},
        "seconds_spread": {name: each.spread for name, each in times.items()},
        "batches_timed": {name: each.batches for name, each in times.items()},
        "budget": budget,
        "verdict": outcome.verdict(),
        "exports": [_described(each) for each in outcome.exports],
        "calibration": outcome.calibration(),
        "never_slower": outcome.stopwatch and {"verdict": outcome.speed_verdict()} | outcome.stopwatch.to_dict(),
        "layers": layers,
        "spec": plan.to_spec().to_dict(),
    }
    finite: dict[str, Any] = _finite(content)
    return finite


def _described(export: ExportReport) -> dict[str, Any]:
    """An export, with the names of its files in the place of their paths."""
    files = [os.path.basename(each) for each in export.files]
    return export.to_dict() | {"path": os.path.basename(export.path), "files": files}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def resolved_yaml(outcome: Outcome, stem: str) -> str:
    """A spec that gives this plan again without a search or timing; comments give the reason for each layer.

    Args:
        outcome: what the spec is about.
        stem: name of the file without ``.yaml``.
    """
    plan = outcome.plan
    spec = plan.to_spec()
    content = spec.to_dict()
    rules = content.pop("rules")
    del content["budget"]
    name = os.path.basename(outcome.quantized_path or "the quantized checkpoint")
    comments = [f"The plan of {name} as a spec. It gives the same layers again, without a search:"]
    comments += [f'TinyQCallback("{stem}.yaml")']
    for metric, values in outcome.results.items():
        comments.append(f"{metric}: float {values['float']:.6g}, quantized {values[outcome.name]:.6g}")
    comments += [verdict for verdict in (outcome.verdict(), outcome.speed_verdict(), outcome.calibration()) if verdict]
    if plan.spec.calibrate:
        comments.append("It gives the same codes only with the same validation batches: they were chosen by these.")
    lines = [_comment(text) for text in comments]
    lines += ["", _yaml({key: content.pop(key) for key in ("method", "kinds", "exclude")})]
    if rules:
        lines.append("rules:  # the first that matches decides")
        for rule in rules:
            first, *more = _yaml(rule).splitlines()
            lines += [f"- {first}", *(f"  {line}" for line in more)]
    else:
        lines.append("rules: []")
    lines += [_yaml(content), "", "# Layer by layer, and why:"]
    lines += [_comment(f"  {line}") for line in plan.table().split("\n")]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> str:
    """A comment of one line: names of metrics and layers may hold line breaks and control characters."""
    return "# " + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _yaml(content: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=1000)
    return text.rstrip("\n")
