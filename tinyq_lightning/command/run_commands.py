"""The commands that run the user's model: ``evaluate`` and ``bench``."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from typing import TYPE_CHECKING, cast

import torch

from tinyq_lightning.command.answer import Answer, file_size, model_class
from tinyq_lightning.command.bench import example_input, time_layers, time_model
from tinyq_lightning.errors import EvaluationError, ModelError
from tinyq_lightning.file import (
    Archive,
    FloatFile,
    build,
    check_format,
    import_lightning_class,
    is_quantized,
    load_quantized,
    open_checkpoint,
    read_checkpoint,
)
from tinyq_lightning.namespaces import derives_from, namespace_of, refuse_other_namespace
from tinyq_lightning.plan import state_bytes
from tinyq_lightning.search import Timing
from tinyq_lightning.table import Table, format_bytes

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

__all__ = [
    "bench",
    "evaluate",
]


def evaluate(args: Namespace) -> Answer:
    """Run the user's test loop on every file; the results are one table."""
    data_class = import_lightning_class(args.data, "LightningDataModule")
    metrics: dict[str, dict[str, float]] = {}
    for path in args.checkpoints:
        module = _load(args, path)
        refuse_other_namespace(module, data_class)
        pytorch = namespace_of(module).pytorch
        # not before its import, which sets the level: without what a Trainer tells of devices, and its tips
        logging.getLogger(pytorch.__name__).setLevel(logging.ERROR)
        try:
            trainer = pytorch.Trainer(
                accelerator=args.accelerator,
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=sys.stderr.isatty() and not args.json,
                limit_test_batches=args.limit_batches,
            )
            logged = trainer.test(module, datamodule=data_class(**args.data_init), verbose=False)
        except Exception as error:
            message = f"{path}: the test loop could not be run: {type(error).__name__}: {error}"
            raise EvaluationError(message) from error
        metrics[path] = {name: float(value) for each in logged for name, value in each.items()}
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    if not names:
        raise EvaluationError(f"test_step of {args.model or 'the model'} logs no metric")
    rows = [
        [path, file_size(path), *(f"{values[name]:.6g}" if name in values else "" for name in names)]
        for path, values in metrics.items()
    ]
    return Answer(Table(["checkpoint", "size", *names], rows).text(), {"metrics": metrics})


def bench(args: Namespace) -> Answer:
    """Compare float and int8: time, throughput, memory."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with Archive(args.checkpoint) as source:
        check_format(source.content, args.checkpoint)
        module_class = model_class(args.model, source, args.trust)
    quantized = load_quantized(args.checkpoint, module_class, trust=args.trust, **args.init)
    float_model = build(module_class, read_checkpoint(args.checkpoint), args.init, args.trust, args.checkpoint).eval()
    timings: list[tuple[str | None, int, Timing]] = []  # of a layer, or None for the model; at a batch size
    for batch in args.batch:
        arguments = example_input(quantized, args.shape, batch)
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
    table = Table(["", "batch", "float ms", "int8 ms", "speedup", "float /s", "int8 /s"], rows)
    text = (
        f"{table.text()}\n\nweights  float {format_bytes(weights[0])}, int8 {format_bytes(weights[1])}\n"
        f"medians of {args.runs} runs, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    data = [
        {"layer": name, "batch": batch, "float_ms": timing.float_ms, "int8_ms": timing.ms}
        for name, batch, timing in timings
    ]
    return Answer(text, {"timings": data, "bytes": {"float": weights[0], "int8": weights[1]}})


def _load(args: Namespace, path: str) -> LightningModule:
    """A module from a float or a quantized file.

    Raises:
        ModelError: it is no LightningModule, which has a test loop.
    """
    with open_checkpoint(path, args.trust) as source:
        factory = model_class(args.model, source, args.trust)
        if is_quantized(source.content):
            module = load_quantized(path, factory, trust=args.trust, **args.init)
        else:
            model = FloatFile(source, factory, args.init, args.trust)
            model.fill()
            module = model.module
    if not derives_from(type(module), "LightningModule"):
        raise ModelError(
            f"{args.model} makes a {type(module).__name__}, which is no LightningModule, and has no test loop"
        )
    # called while it was loaded; a Trainer on one device would call it again, without the mesh of processes
    vars(module)["configure_model"] = _nothing
    return cast("LightningModule", module)


def _nothing() -> None:
    """What a Trainer calls to configure a model that is."""
