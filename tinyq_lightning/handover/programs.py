"""Programs of ``torch.export``, which hold int8 codes as buffers and no function of this package."""

from __future__ import annotations

import io
import logging
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from tinyq_lightning.errors import ExportError
from tinyq_lightning.handover.example import Example
from tinyq_lightning.handover.graph_forward import graph_forward
from tinyq_lightning.handover.outputs import portable, tensors_of
from tinyq_lightning.handover.request import Request
from tinyq_lightning.handover.why_no_graph import why_no_graph

__all__ = [
    "arranged",
    "errors_logged_alone",
    "exported_program",
    "open_pt2",
    "refuse_classes",
    "write_pt2",
]


def exported_program(
    request: Request, returns: Callable[[Any, Sequence[Tensor]], Any] = lambda outputs, taken: portable(outputs)
) -> ExportedProgram:
    """The call as a program.

    Args:
        request: what to export.
        returns: makes what the program returns of what the module returned, and of the tensors that it was given.

    Raises:
        ExportError: torch cannot export the model, or not for all sizes that were asked for.
    """
    example = request.example
    shapes = request.dims.for_torch(example)
    try:
        # of a graph that it could not finish torch prints what it has
        with (
            redirect_stderr(io.StringIO()),
            errors_logged_alone("torch.fx.experimental.symbolic_shapes"),
            graph_forward(request.module, example, returns),
        ):
            return torch.export.export(
                request.module, example.args, example.kwargs, dynamic_shapes=shapes, strict=False
            )
    except ExportError:
        raise
    except Exception as error:  # of torch, or of the model when it is traced
        reason = why_no_graph(request, error)
        raise ExportError(f"torch.export cannot export the model: {reason}") from error


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


def write_pt2(request: Request, path: str) -> Sequence[str]:
    """Write a ``.pt2`` file, see ``torch.export.save``.

    Raises:
        ExportError: the model returns text, or takes what only its class can make.
    """
    refuse_classes(request.example)
    program = exported_program(request)
    for output in program.graph_signature.output_specs:
        if isinstance(value := getattr(output.arg, "value", None), str):
            raise ExportError(f"the model returns the text {value!r}, which a file of torch.export cannot hold")
    torch.export.save(program, path)
    return ()


def refuse_classes(example: Example) -> None:
    """Check that the inputs are in containers of Python's own: a file does not hold the classes of others.

    Raises:
        ExportError: they are not.
    """
    for name, value in example.parameters.items():
        if found := _other_class(value):
            raise ExportError(
                f"the example input {name} holds a {found.__name__}, whose class a file of torch.export does not hold: "
                "let a method take tuples, lists and dicts of tensors, and name it as method="
            )


def _other_class(value: Any) -> type | None:
    """The class of a container that is none of Python's own."""
    leaves = pytree.tree_leaves(value)
    if len(leaves) == 1 and leaves[0] is value:
        return None
    if type(value) not in (tuple, list, dict, OrderedDict, defaultdict, deque):
        return type(value)
    inside = value.values() if isinstance(value, dict) else value
    return next((found for each in inside if (found := _other_class(each))), None)


def open_pt2(path: str, request: Request) -> Callable[[Example], Sequence[Tensor]]:
    """Load a ``.pt2`` file."""
    with errors_logged_alone("torch._export.serde.serialize"):  # of a deque, which it loads all the same
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
