"""The command ``quantize``: one float file, or many, some of which may be done already or bad."""

from __future__ import annotations

import os
import time
import warnings
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

from tqdm import tqdm

from tinyq_lightning.command.answer import Answer, file_size, model_class, note, progress, why_failed
from tinyq_lightning.command.file_commands import described, on_screen, plan_of, spec_of
from tinyq_lightning.command.workers import run_each
from tinyq_lightning.errors import CheckpointError
from tinyq_lightning.file import (
    as_factory,
    file_exists,
    file_sha256,
    is_folder,
    is_quantized,
    open_checkpoint,
    quantize_file,
    quantized_paths,
    refuse_existing,
    stem_of,
    write_checkpoint,
)
from tinyq_lightning.methods import METHODS
from tinyq_lightning.namespaces import OF_LIGHTNING
from tinyq_lightning.plan import Coverage, WithValues
from tinyq_lightning.spec import QuantizationSpec
from tinyq_lightning.table import Table, format_bytes, screen_width

__all__ = [
    "quantize",
]

Status = Literal["quantized", "done before", "quantized file", "failed"]


@dataclass(frozen=True)
class FileResult:
    """What became of one of many files.

    Attributes:
        checkpoint: the float file.
        status: ``done before`` if the quantized file was there, made from the same file by the same spec;
            ``quantized file`` if it was none to quantize, as a glob finds on its second run.
        seconds: that it took.
        path: of the quantized file, if there is one.
        label: of its plan.
        layers: how many it has, and how many of these are quantized.
        float_bytes: of its layers as floats.
        bytes: of its layers now.
        error: why it failed.
        warnings: of quantizing it.
    """

    checkpoint: str
    status: Status
    seconds: float = 0.0
    path: str | None = None
    label: str | None = None
    layers: tuple[int, int] | None = None
    float_bytes: int = 0
    bytes: int = 0
    error: str | None = None
    warnings: tuple[str, ...] = ()


def quantize(args: Namespace) -> Answer:
    """Quantize float checkpoints to files."""
    if len(args.checkpoints) > 1 or args.jobs is not None:
        return _quantize_many(args)
    (checkpoint,) = args.checkpoints
    spec = spec_of(args)
    output, folder = (None, args.output) if is_folder(args.output) else (args.output, None)
    if output is not None:
        refuse_existing(output, args.overwrite)
    with progress("quantizing") as around:
        path, content, covered = _write(args, checkpoint, spec, around, folder, output)
    plan = plan_of(content["tinyq"])
    before, after = sum(d.float_bytes for d in plan), sum(d.bytes for d in plan)
    text = (
        f"{on_screen(plan)}\n\n"
        f"{covered}\n"
        f"float      {checkpoint}  {file_size(checkpoint)}\n"
        f"quantized  {path}  {file_size(path)}"
    )
    return Answer(text, {"path": path, **described(content), "layer_bytes": {"float": before, plan.label: after}})


def _write(
    args: Namespace,
    checkpoint: str,
    spec: QuantizationSpec,
    around: WithValues,
    folder: str | None,
    output: str | None = None,
) -> tuple[str, dict[str, Any], Coverage]:
    """Path, content and coverage of the quantized file that was written: to ``output``, or as :func:`_target` says."""
    with open_checkpoint(checkpoint, args.trust) as source:
        factory = model_class(args.model, source, args.trust)
        content, covered = quantize_file(source, factory, spec, args.init, around, args.trust)
    path = output or _target(checkpoint, spec, folder, plan_of(content["tinyq"]).file_label)
    refuse_existing(path, args.overwrite)
    write_checkpoint(content, path)
    return path, content, covered


def _target(checkpoint: str, spec: QuantizationSpec, folder: str | None, label: str) -> str:
    """Where a file of this label goes: into ``folder`` if one is given, else where the spec says."""
    save = spec.save if not folder else replace(spec.save, dirpath=folder)
    return next(quantized_paths(save, os.path.dirname(checkpoint.rstrip("/")), stem_of(checkpoint), label))


def _quantize_many(args: Namespace) -> Answer:
    """Quantize each file; those that are done, or bad, do not stop the others."""
    spec = spec_of(args)
    if args.output is not None and args.output.endswith(".ckpt") and not is_folder(args.output):
        raise CheckpointError(f"{args.output}: of several files --output is the folder that they go to, not a file")
    if args.model is not None:
        as_factory(args.model)  # a name that is none is told once, also where all files are done before
    _refuse_one_name_for_two(args, spec)
    jobs = min(args.jobs or 1, len(args.checkpoints))
    work, found = partial(_quantize_one, args, spec, jobs == 1), []
    with tqdm(total=len(args.checkpoints), desc="quantizing", unit=" files", disable=None, leave=False) as bar:
        for result in run_each(work, args.checkpoints, jobs, _lost):
            found.append(result)
            bar.update()
            for warning in result.warnings:
                note(f"warning: {result.checkpoint}: {warning}")
            if result.error is not None:
                note(f"failed: {result.error}")
    found.sort(key=lambda each: args.checkpoints.index(each.checkpoint))
    counts = Counter(each.status for each in found)
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    text = f"{_summary_table(found).text(screen_width())}\n\n{summary}"
    return Answer(text, {"files": [asdict(each) for each in found]}, good=not counts["failed"])


def _refuse_one_name_for_two(args: Namespace, spec: QuantizationSpec) -> None:
    """Check that no two files would be written to one path.

    Raises:
        CheckpointError: they would.
    """
    targets: dict[str, list[str]] = defaultdict(list)
    for checkpoint in args.checkpoints:
        targets[os.path.normpath(_target(checkpoint, spec, args.output, "*"))].append(checkpoint)
    for path, sources in targets.items():
        if len(sources) > 1:
            raise CheckpointError(
                f"{', '.join(sources)} would all be written to {path}: quantize them one by one, or each beside its "
                "float file, without --output, save.dirpath and save.filename"
            )


def _quantize_one(args: Namespace, spec: QuantizationSpec, bar: bool, checkpoint: str) -> FileResult:
    """Quantize one of many files. No exception of the file or of its class leaves this."""
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("ignore", module=OF_LIGHTNING)
        try:
            result = _done_before(args, spec, checkpoint)
            if result is None:
                with progress(os.path.basename(checkpoint)) if bar else nullcontext(nullcontext) as around:
                    path, content, _ = _write(args, checkpoint, spec, around, args.output)
                result = _described_file(checkpoint, "quantized", path, content["tinyq"])
        except Exception as error:
            result = FileResult(checkpoint, "failed", error=why_failed(checkpoint, error))
    told = tuple(str(each.message) for each in caught)
    return replace(result, seconds=time.perf_counter() - start, warnings=told)


def _done_before(args: Namespace, spec: QuantizationSpec, checkpoint: str) -> FileResult | None:
    """The result if there is nothing to do: the file is no float one, or was quantized before by the same spec."""
    with open_checkpoint(checkpoint, args.trust) as source:
        if is_quantized(source.content):
            return FileResult(checkpoint, "quantized file")
    if args.overwrite:
        return None
    asked = replace(spec, budget=None, methods=(), keep="all").to_dict() | {"save": {"dirpath": None, "filename": None}}
    sha256 = None
    for label in (*METHODS, "mixed"):
        path = _target(checkpoint, spec, args.output, label)
        if not file_exists(path):
            continue
        with open_checkpoint(path) as there:
            tinyq = there.content["tinyq"] if is_quantized(there.content) else {}
        sha256 = sha256 or file_sha256(checkpoint)
        if tinyq and sha256 is not None and tinyq["float_sha256"] == sha256 and plan_of(tinyq).spec.to_dict() == asked:
            return _described_file(checkpoint, "done before", path, tinyq)
    return None


def _described_file(checkpoint: str, status: Status, path: str, tinyq: dict[str, Any]) -> FileResult:
    plan = plan_of(tinyq)
    return FileResult(
        checkpoint,
        status,
        path=path,
        label=plan.label,
        layers=(sum(each.method != "float" for each in plan), len(plan)),
        float_bytes=sum(each.float_bytes for each in plan),
        bytes=sum(each.bytes for each in plan),
    )


def _lost(checkpoint: str, exit_code: int | None) -> FileResult:
    """The result of a file whose process has ended before it was done, as one that takes too much memory does."""
    ended = f"was killed by signal {-exit_code}" if exit_code and exit_code < 0 else f"ended with {exit_code}"
    return FileResult(checkpoint, "failed", error=f"{checkpoint}: the process that quantized it {ended}")


def _summary_table(results: Sequence[FileResult]) -> Table:
    rows = [
        [
            each.checkpoint,
            each.status,
            each.label or "",
            "" if each.layers is None else "{} of {}".format(*each.layers),
            format_bytes(each.float_bytes) if each.path else "",
            format_bytes(each.bytes) if each.path else "",
            f"{each.seconds:.1f}",
        ]
        for each in results
    ]
    return Table(["checkpoint", "result", "method", "layers", "float", "now", "seconds"], rows, left=3)
