"""The commands on files that are there: ``inspect`` and ``verify``."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import fields, replace
from typing import Any

from torch import Tensor, nn

from tinyq_lightning.command.answer import Answer, file_size, model_class, progress
from tinyq_lightning.command.differences import chosen_by_data, differences
from tinyq_lightning.errors import CheckpointError
from tinyq_lightning.file import (
    Archive,
    FloatFile,
    Folder,
    check_format,
    escaped,
    float_content,
    is_quantized,
    is_safetensors,
    open_checkpoint,
    quantize_file,
    read_content,
)
from tinyq_lightning.plan import MANY_LAYERS, Decision, Plan, file_coverage, resolve
from tinyq_lightning.spec import QuantizationSpec, as_spec
from tinyq_lightning.table import Table, format_bytes, screen_width

__all__ = [
    "described",
    "inspect",
    "on_screen",
    "plan_of",
    "spec_of",
    "verify",
]


def inspect(args: Namespace) -> Answer:
    """Describe a quantized file, or what would be quantized of a float one."""
    kind = "safetensors file of a quantized checkpoint" if is_safetensors(args.checkpoint) else "quantized checkpoint"
    if is_safetensors(args.checkpoint):
        content = read_content(args.checkpoint)
    else:
        with open_checkpoint(args.checkpoint, args.trust) as source:
            if not is_quantized(source.content):
                return _inspect_float(args, source)
            content = source.content
            check_format(content, args.checkpoint)
    tinyq, plan = content["tinyq"], plan_of(content["tinyq"])
    versions = ", ".join(f"{name} {version}" for name, version in tinyq["versions"].items())
    lines = [
        f"{args.checkpoint}: {kind}, {file_size(args.checkpoint)}",
        f"format {tinyq['format_version']}, epoch {content.get('epoch')}, step {content.get('global_step')}",
        str(file_coverage(plan, content["state_dict"])),
        "",
        on_screen(plan),
        "",
        *_metrics_lines(tinyq, plan.column_label),
        f"made from   float file with SHA-256 {tinyq['float_sha256'] or 'unknown: weights that were not in a file'}",
        f"made with   {versions}",
        "integrity   not checked: run verify",
    ]
    return Answer("\n".join(lines), {"path": args.checkpoint, "quantized": True, **described(content)})


def _inspect_float(args: Namespace, source: Archive | Folder) -> Answer:
    content = float_content(source.content, args.checkpoint)
    tensors = {name: value for name, value in content["state_dict"].items() if isinstance(value, Tensor)}
    total = sum(value.nbytes for value in tensors.values())
    of_lightning = "state_dict" in source.content
    head = (
        f"{args.checkpoint}: float {'checkpoint' if of_lightning else 'state dict'}, {file_size(args.checkpoint)}\n"
        f"{len(tensors)} tensors of {format_bytes(total)}"
        + (f", epoch {content.get('epoch')}, step {content.get('global_step')}\n" if of_lightning else "\n")
    )
    data = {"path": args.checkpoint, "quantized": False, "bytes": total}
    if args.model is None:
        rows = [
            [name, "×".join(map(str, value.shape)), str(value.dtype).removeprefix("torch."), format_bytes(value.nbytes)]
            for name, value in tensors.items()
            if value.dim() >= 2 and value.is_floating_point()
        ]
        table = Table(["matrix", "shape", "dtype", "size"], rows).text()
        note = "Those of layers would be quantized; give --model to see which, and the plan."
        return Answer(f"{head}\n{table}\n\n{note}", data | {"matrices": [row[0] for row in rows]})
    model = FloatFile(source, model_class(args.model, source, args.trust), args.init, args.trust)
    with progress("reading") as around:

        def present(layer: nn.Module) -> ExitStack:
            stack = ExitStack()
            stack.enter_context(around(layer))
            stack.enter_context(model.present(layer))
            return stack

        plan = resolve(spec_of(args), model.module, present)
    text = f"{head}\nWhat would be quantized:\n\n{on_screen(plan)}"
    return Answer(text, data | {"plan": plan.to_list()})


def verify(args: Namespace) -> Answer:
    """Check that a quantized file is intact and, given the float file, that quantizing it again gives the same."""
    content = read_content(args.checkpoint)
    tinyq = content["tinyq"]
    count = len(content["state_dict"])
    text = f"{args.checkpoint}: intact, format {tinyq['format_version']}, {count} tensors, all digests agree"
    data: dict[str, Any] = {"path": args.checkpoint, "intact": True}
    if args.float is None:
        return Answer(text, data)
    plan = plan_of(tinyq)
    with open_checkpoint(args.float, args.trust) as source, progress("quantizing again") as around:
        spec = replace(plan.to_spec(), calibrate=None)  # the data is not here
        factory = model_class(args.model, source, args.trust)
        again, _ = quantize_file(source, factory, spec, args.init, around, args.trust)
    if tinyq["float_sha256"] not in (None, again["tinyq"]["float_sha256"]):
        text += f"\n{args.float}: this is not the float file it was made from, by SHA-256"
        return Answer(text, data | {"same": False, "differs": ["float_sha256"]}, good=False)
    differs = differences(content, again)
    if differs:
        text += f"\n{args.float}: quantized again it differs in {', '.join(differs)}"
    else:
        text += f"\n{args.float}: quantized again it gives the same tensors, plan and content, bit by bit"
        if by_data := chosen_by_data(tinyq):
            text += f", but for codes and biases of {len(by_data)} layers, which were chosen by data that is not here"
    return Answer(text, data | {"same": not differs, "differs": differs}, good=not differs)


def spec_of(args: Namespace) -> QuantizationSpec:
    """What ``--method`` or ``--spec``, ``--kinds`` and ``--exclude`` ask for."""
    spec = as_spec(args.spec or args.method or "w8a32")
    given: dict[str, Any] = {} if args.kinds is None else {"kinds": "all" if args.kinds == ["all"] else args.kinds}
    return replace(spec, exclude=(*spec.exclude, *args.exclude), **given)


def plan_of(tinyq: Mapping[str, Any]) -> Plan:
    """The plan of a quantized checkpoint, without fields that this version does not know."""
    known = {field.name for field in fields(Decision)}
    rows = [{key: value for key, value in entry.items() if key in known} for entry in tinyq["plan"]]
    decisions = tuple(Decision(**{**row, "aliases": tuple(row.get("aliases", ()))}) for row in rows)
    try:
        return Plan(decisions, QuantizationSpec.from_dict(_as_text(tinyq["spec"])))
    except Exception as error:  # SpecError, or another for values that no YAML has
        raise CheckpointError(f"the file is damaged: tinyq.spec is no spec: {error}") from error


def on_screen(plan: Plan) -> str:
    """The plan as a table that fits the terminal, in groups of layers if it has many."""
    return plan.table(screen_width(), group=len(plan) > MANY_LAYERS)


def _as_text(value: Any) -> Any:
    """The spec of a file, in which nothing is resolved: it was written without interpolations."""
    if isinstance(value, Mapping):
        return {key: _as_text(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_text(item) for item in value]
    return escaped(value) if isinstance(value, str) else value


def described(content: Mapping[str, Any]) -> dict[str, Any]:
    """The ``tinyq`` block without its digests, which nobody reads."""
    tinyq = copy.copy(content["tinyq"])
    del tinyq["digests"]
    return {"tinyq": tinyq}


def _metrics_lines(tinyq: Mapping[str, Any], label: str) -> list[str]:
    rows = [
        [name, *(f"{values.get(key, float('nan')):.6g}" for key in ("float", label, "delta"))]
        for name, values in tinyq["metrics"].items()
    ]
    if not rows:
        return ["metrics     none were measured"]
    return [
        f"metrics of the {tinyq.get('metrics_from')} loop",
        "",
        Table(["", "float", label, "delta"], rows).text(),
        "",
    ]
