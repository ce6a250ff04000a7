"""Programs of ``torch.export``, which hold int8 codes as buffers and no function of this package."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from tinyq_lightning.errors import ExportError
from tinyq_lightning.handover.example import Example
from tinyq_lightning.handover.request import Request

__all__ = [
    "arranged",
    "errors_logged_alone",
    "exported_program",
    "open_pt2",
    "tensors_of",
    "write_pt2",
]


def exported_program(request: Request) -> ExportedProgram:
    """The call as a program.

    Raises:
        ExportError: torch cannot export the model, or not for all sizes that were asked for.
    """
    example = request.example
    shapes = request.dims.for_torch(example)
    try:
        # of a graph that it could not finish torch prints what it has
        with redirect_stderr(io.StringIO()), errors_logged_alone("torch.fx.experimental.symbolic_shapes"):
            return torch.export.export(
                request.module, example.args, example.kwargs, dynamic_shapes=shapes, strict=False
            )
    except Exception as error:  # of torch, or of the model when it is traced
        if type(error).__name__ == "GuardOnDataDependentSymNode":
            place = re.search(r"Caused by: \((.*?)\)", str(error))
            raise ExportError(
                "torch.export cannot export the model: it takes a branch or a size from the values of a tensor (if, "
                f"while, int(x), x.item()){f', at {place[1]}' if place else ''}, and a graph is the same for all "
                "values: write torch.where, or export a method without it"
            ) from error
        advice = (
            f". If the sizes of {', '.join(request.dims.names)} may not change, give dynamic=False, or name only "
            "the dimensions that may, with their bounds as torch.export.Dim has them"
            if shapes
            else ""
        )
        message = f"torch.export cannot export the model: {type(error).__name__}: {_shortened(str(error))}{advice}"
        raise ExportError(message) from error


@contextmanager
def errors_logged_alone(*names: str) -> Iterator[None]:
    """Context manager in which some loggers of libraries log errors only."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _shortened(message: str) -> str:
    """The first lines of an error of torch, without its advice on logging."""
    lines = [line.partition("For more information")[0].strip() for line in message.splitlines()]
    return " ".join([line for line in lines if line][:2])[:400].rstrip(".")


def tensors_of(outputs: Any) -> Sequence[Tensor]:
    """The tensors of what a program returns, in the order of torch's pytree."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def write_pt2(request: Request, path: str) -> Sequence[str]:
    """Write a ``.pt2`` file, see ``torch.export.save``.

    Raises:
        ExportError: the model returns text.
    """
    program = exported_program(request)
    for output in program.graph_signature.output_specs:
        if isinstance(value := getattr(output.arg, "value", None), str):
            raise ExportError(f"the model returns the text {value!r}, which a file of torch.export cannot hold")
    torch.export.save(program, path)
    return ()


def open_pt2(path: str, request: Request) -> Callable[[Example], Sequence[Tensor]]:
    """Load a ``.pt2`` file."""
    program = torch.export.load(path)
    module, structure = program.module(), program.call_spec.in_spec

    def run(example: Example) -> Sequence[Tensor]:
        args, kwargs = arranged(example, structure)
        return tensors_of(module(*args, **kwargs))

    return run


def arranged(example: Example, structure: Any) -> tuple[list[Any], dict[str, Any]]:
    """The arguments as a program takes them: by name those that it was exported with by name, the others by place.

    Args:
        example: the arguments, in whatever way they were given.
        structure: torch's ``TreeSpec`` of the program's arguments.
    """
    if pytree.tree_structure((tuple(example.args), dict(example.kwargs))) == structure:
        return list(example.args), dict(example.kwargs)
    names = list(structure.child(1).context if hasattr(structure, "child") else structure.children_specs[1].context)
    by_place = [value for name, value in example.parameters.items() if name not in names]
    return by_place, {name: example.parameters[name] for name in names if name in example.parameters}
