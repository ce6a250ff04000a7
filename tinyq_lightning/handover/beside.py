"""Exports of a run: written beside the quantized checkpoint, with inputs from the run where the model tells none."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from tinyq_lightning.errors import ModelError
from tinyq_lightning.handover.example import example_for, parameters_of_call, refuse_without_forward
from tinyq_lightning.handover.exporting import export
from tinyq_lightning.handover.formats import FORMATS, Program
from tinyq_lightning.handover.report import ExportReport
from tinyq_lightning.handover.source import on_cpu
from tinyq_lightning.handover.untouched import untouched
from tinyq_lightning.methods import Activations

__all__ = [
    "check_formats",
    "export_beside",
]


def check_formats(names: Iterable[str]) -> None:
    """Check that the libraries of some formats are installed.

    Raises:
        ExportError: torch is too old for one.
        MissingExtraError: one is not.
    """
    for name in names:
        FORMATS[name].check_installed()


def export_beside(
    module: nn.Module,
    quantized_path: str,
    to: str,
    batch: Any,
    activations: Activations = "dynamic",
    calls: Sequence[Any] = (),
) -> ExportReport:
    """Export a module beside its quantized checkpoint, replacing an earlier export.

    Args:
        module: with quantized layers.
        quantized_path: of the checkpoint, which is written already.
        to: name of the format.
        batch: what a loader gave, for the inputs of a module without ``example_input_array``; None for none.
        activations: as of :func:`~tinyq_lightning.export`; static ones have it in the name of the file.
        calls: inputs that ``forward`` was called with, for the ranges of static activations.

    Raises:
        TinyQError: it could not be exported; the message says what to do.
    """
    wanted = FORMATS[to]
    is_static = activations != "dynamic"
    path = f"{quantized_path.removesuffix('.ckpt')}{f'-{activations}' if is_static else ''}{wanted.ending}"
    if not isinstance(wanted, Program):
        return export(quantized_path, path, to=to, overwrite=True)
    refuse_without_forward(module)
    model = on_cpu(module)
    given = getattr(module, "example_input_array", None)
    if given is None:
        given = calls[0] if calls else None if batch is None else _inputs_from(model, batch)
    if given is None:
        raise ModelError(
            f"there is no example of the inputs of {type(module).__name__}.forward, and it cannot be called with what "
            f"the first batch holds: set self.example_input_array in __init__. {os.path.basename(quantized_path)} can "
            "be exported later: tinyq-lightning export, with --example"
        )
    static: dict[str, Any] = {"activations": activations, "calibration": calls} if is_static else {}
    return export(model, path, given, to=to, overwrite=True, **static)


def _inputs_from(model: nn.Module, batch: Any) -> Any:
    """What of a batch ``forward`` can be called with; None if nothing of it."""
    for given in _candidates(model, batch):
        try:
            example = example_for(model, given, "forward")
            with untouched(model):
                model(*example.args, **example.kwargs)
        except Exception:  # whatever a forward raises for inputs that are not its own
            continue
        return given
    return None


def _candidates(model: nn.Module, batch: Any) -> Iterator[Any]:
    """The batch, what of a mapping has the names of parameters, and the first of several items, or all but the last."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        names = parameters_of_call(model, "forward")
        yield {name: value for name, value in batch.items() if name in names}
        yield (dict(batch),)
    elif isinstance(batch, tuple | list) and batch:
        yield from _candidates(model, batch[0])
        for items in (tuple(batch[:-1]), tuple(batch), (batch,)):
            if items:
                yield items
    else:
        yield (batch,)
