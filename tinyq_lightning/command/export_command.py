"""The command that hands a quantized checkpoint over to other runtimes: ``export``."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from tinyq_lightning.command.answer import Answer, model_class
from tinyq_lightning.command.loop import made_data, run_loop
from tinyq_lightning.command.shapes import drawn
from tinyq_lightning.errors import ExportError, ModelError
from tinyq_lightning.file import Archive, import_lightning_class, is_safetensors, load_quantized, refuse_existing
from tinyq_lightning.handover import (
    ExportReport,
    Program,
    check_place,
    format_for,
    import_example,
    recorded_calls,
    session_forward,
)
from tinyq_lightning.handover import export as write_export
from tinyq_lightning.namespaces import derives_from
from tinyq_lightning.table import Table, screen_width

__all__ = [
    "export",
]


def export(args: Namespace) -> Answer:
    """Write a quantized checkpoint in another format, run it there, and compare it."""
    if args.to is None and args.output is None:
        raise ExportError("give the format with --to, or an --output whose ending tells it")
    wanted = format_for(args.output or "", args.to)
    path = args.output or os.path.splitext(args.checkpoint)[0] + wanted.ending
    if not isinstance(wanted, Program):
        report = write_export(args.checkpoint, path, to=wanted.name, overwrite=args.overwrite)
        return Answer(str(report), report.to_dict())
    given: dict[str, Any] = {
        "example_inputs": _inputs(args),
        "to": wanted.name,
        "method": args.method,
        "dynamic": _dynamic(args.dynamic),
        "activations": args.activations,
        "max_error": args.max_error,
        "overwrite": args.overwrite,
    }
    if args.calibration:
        given["calibration"] = import_example(args.calibration)
    if args.data is None:
        of_file = {"module_class": _class_of(args), "part": args.part, "trust": args.trust, "init_args": args.init}
        report = write_export(args.checkpoint, path, **given, **of_file)
        return Answer(str(report), report.to_dict())
    return _measured(args, wanted, path, given)


def _measured(args: Namespace, wanted: Program, path: str, given: dict[str, Any]) -> Answer:
    """Export with ranges and example inputs from the validation data; then run the validation loop on both."""
    check_place(path)  # sooner than the validation loop runs
    refuse_existing(path, args.overwrite, ExportError)
    wanted.check_activations(args.activations)
    data_class = import_lightning_class(args.data, "LightningDataModule")
    model: Any = load_quantized(args.checkpoint, _class_of(args), part=args.part, trust=args.trust, **args.init)
    if not derives_from(type(model), "LightningModule"):
        raise ModelError(
            f"--data runs the validation loop of a LightningModule, and this is a {type(model).__name__}: give the "
            "ranges of static activations with --calibration package.module:function"
        )

    def run(limit: float | None) -> dict[str, float]:
        data = made_data(data_class, args.data, args.data_init)
        return run_loop(model, data, "validate", args.checkpoint, limit=limit, shows=not args.json)

    if args.activations != "dynamic" and not args.calibration:
        given["calibration"] = calls = _calls(model, args.method, args.batches, run)
        if given["example_inputs"] is None and getattr(model, "example_input_array", None) is None:
            given["example_inputs"] = calls[0]
    report = write_export(model.eval(), path, **given)
    here = run(args.limit_batches)
    with session_forward(model, path, to=report.format, method=args.method):
        report = replace(report, metrics=run(args.limit_batches))
    return Answer(f"{report}\n\n{_metrics(here, report)}", report.to_dict() | {"model_metrics": here})


def _calls(model: nn.Module, method: str, batches: int, run: Any) -> list[Any]:
    with recorded_calls(model, method) as calls:
        run(batches)
    if not calls:
        raise ExportError(
            f"the validation loop of {type(model).__name__} never calls self.{method}, so there are no inputs to take "
            "ranges from: give them with --calibration package.module:function"
        )
    return calls


def _metrics(here: Mapping[str, float], report: ExportReport) -> str:
    rows = [
        [name, f"{value:.6g}", f"{report.metrics[name]:.6g}"] for name, value in here.items() if name in report.metrics
    ]
    return Table(["validation", "quantized", report.format], rows).text(screen_width())


def _inputs(args: Namespace) -> Any:
    if args.shape:
        return drawn(args.shape)
    return import_example(args.example) if args.example else None


def _class_of(args: Namespace) -> Any:
    if args.model is not None or is_safetensors(args.checkpoint):
        return args.model  # any class or function that makes the module
    with Archive(args.checkpoint) as source:
        return model_class(args.model, source, args.trust)


def _dynamic(names: list[str] | None) -> bool | dict[int, str]:
    """``batch tokens`` names the first dimensions of every input; ``none`` fixes all sizes."""
    if names is None:
        return True
    return False if names == ["none"] else dict(enumerate(names))
