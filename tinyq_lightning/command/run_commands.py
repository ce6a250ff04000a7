"""The commands that run the user's model: ``evaluate`` and ``bench``."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from tinyq_lightning.command.answer import Answer, file_size, model_class, note, why_failed
from tinyq_lightning.command.bench import example_input, time_layers, time_model
from tinyq_lightning.command.file_commands import spec_of
from tinyq_lightning.command.loop import STEPS, made_data, run_loop
from tinyq_lightning.errors import CheckpointError, EvaluationError, ModelError
from tinyq_lightning.file import (
    FloatFile,
    as_factory,
    build,
    check_format,
    import_lightning_class,
    is_quantized,
    is_safetensors,
    load_quantized,
    open_checkpoint,
    read_content,
)
from tinyq_lightning.handover import import_example
from tinyq_lightning.namespaces import derives_from
from tinyq_lightning.plan import state_bytes
from tinyq_lightning.search import Timing, quantize
from tinyq_lightning.table import Table, format_bytes, screen_width

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

__all__ = [
    "bench",
    "evaluate",
]


def evaluate(args: Namespace) -> Answer:
    """Run the user's test or validation loop on every file; of several, a bad one does not stop the others."""
    data_class = import_lightning_class(args.data, "LightningDataModule")
    several = len(args.checkpoints) > 1
    if several and args.model is not None:
        as_factory(args.model)  # a name that is none is told once
    metrics: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    for path in args.checkpoints:
        data = made_data(data_class, args.data, args.data_init)
        limits = {"accelerator": args.accelerator, "limit": args.limit_batches}
        try:
            metrics[path] = run_loop(_load(args, path), data, args.loop, path, shows=not args.json, **limits)
        except Exception as error:
            if not several:
                raise
            metrics[path], failed[path] = {}, why_failed(path, error)
            note(f"failed: {failed[path]}")
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    if not names and not failed:
        raise EvaluationError(f"{STEPS[args.loop]}_step of {args.model or 'the model'} logs no metric")
    rows = [
        [
            path,
            "failed" if path in failed else file_size(path),
            *(f"{values[name]:.6g}" if name in values else "" for name in names),
        ]
        for path, values in metrics.items()
    ]
    table = Table(["checkpoint", "size", *names], rows).text(screen_width())
    return Answer(table, {"metrics": metrics, "failed": failed}, good=not failed)


def bench(args: Namespace) -> Answer:
    """Compare float and quantized: time, throughput, memory."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    quantized, float_model, label = _pair(args)
    given = import_example(args.example) if args.example else None
    timings: list[tuple[str | None, int, Timing]] = []  # of a layer, or None for the model; at a batch size
    for batch in args.batch:
        arguments = example_input(quantized, args.shape, batch, given)
        timings.append((None, batch, time_model(quantized, float_model, arguments, args.runs)))
        if args.layers:
            layers = time_layers(quantized, float_model, arguments, args.runs)
            timings += [(name, batch, timing) for name, timing in layers.items()]
    rows = [
        [
            name or "all of the model",
            str(batch),
            f"{timing.float_ms:.3f}",
            f"{timing.ms:.3f}",
            f"{timing.float_ms / timing.ms:.2f}×",
            f"{1000 * batch / timing.float_ms:.0f}",
            f"{1000 * batch / timing.ms:.0f}",
        ]
        for name, batch, timing in timings
    ]
    weights = [state_bytes(model.state_dict()) for model in (float_model, quantized)]
    table = Table(["", "batch", "float ms", f"{label} ms", "speedup", "float /s", f"{label} /s"], rows)
    text = (
        f"{table.text(screen_width())}\n\n"
        f"weights  float {format_bytes(weights[0])}, {label} {format_bytes(weights[1])}\n"
        f"medians of {args.runs} runs, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    data = [
        {"layer": name, "batch": batch, "float_ms": timing.float_ms, "quantized_ms": timing.ms}
        for name, batch, timing in timings
    ]
    return Answer(text, {"timings": data, "bytes": {"float": weights[0], "quantized": weights[1]}})


def _pair(args: Namespace) -> tuple[nn.Module, nn.Module, str]:
    """The quantized model, the same with float layers, and what the first is called.

    Of a quantized file the float weights are those that the class makes; a float file is quantized here.
    """
    path = args.checkpoint
    factory, quantized = _factory(args, path)
    if quantized:
        if asked := [name for name in ("method", "spec", "kinds", "exclude") if getattr(args, name)]:
            raise CheckpointError(f"{path} is quantized already: leave --{asked[0]} out, or give the float file")
        content = read_content(path)
        module = load_quantized(path, factory, trust=args.trust, **args.init)
        return module, build(factory, content, args.init, args.trust, path).eval(), content["tinyq"]["label"]
    module, floats = (_float_model(args, path, factory).eval() for _ in range(2))
    return module, floats, quantize(module, spec_of(args)).label


def _factory(args: Namespace, path: str) -> tuple[Any, bool]:
    """What makes the module of a file, and whether the file is quantized."""
    if is_safetensors(path):
        if args.model is None:
            raise ModelError(f"{path} does not say which class it was made from: give --model package.module:Class")
        return as_factory(args.model), True
    with open_checkpoint(path, args.trust) as source:
        quantized = is_quantized(source.content)
        if quantized:
            check_format(source.content, path)
        return model_class(args.model, source, args.trust), quantized


def _float_model(args: Namespace, path: str, factory: Any) -> nn.Module:
    with open_checkpoint(path, args.trust) as source:
        model = FloatFile(source, factory, args.init, args.trust)
        model.fill()
    return model.module


def _load(args: Namespace, path: str) -> LightningModule:
    """A module from a float or a quantized file.

    Raises:
        ModelError: it is no LightningModule, which has a test loop.
    """
    factory, quantized = _factory(args, path)
    if quantized:
        module = load_quantized(path, factory, trust=args.trust, **args.init)
    else:
        module = _float_model(args, path, factory)
    if not derives_from(type(module), "LightningModule"):
        raise ModelError(
            f"{args.model} makes a {type(module).__name__}, which is no LightningModule, and has no test loop"
        )
    # called while it was loaded; a Trainer on one device would call it again, without the mesh of processes
    vars(module)["configure_model"] = _nothing
    return cast("LightningModule", module)


def _nothing() -> None:
    """What a Trainer calls to configure a model that is."""
