"""The graph of a model in ONNX: exported by torch, with int8 codes as initializers, and tidied."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tinyq_lightning.errors import ExportError
from tinyq_lightning.handover.onnx_layers import onnx_forms
from tinyq_lightning.handover.onnx_operators import OPSET
from tinyq_lightning.handover.onnx_tidying import tidy
from tinyq_lightning.handover.outputs import tensors_of
from tinyq_lightning.handover.programs import errors_logged_alone, exported_program
from tinyq_lightning.handover.request import Request

if TYPE_CHECKING:
    import onnx_ir

__all__ = [
    "input_names",
    "onnx_graph",
    "save_graph",
]

_LARGEST_FILE = 1_900_000_000
"""Bytes; protobuf refuses messages of 2 GiB."""


def onnx_graph(request: Request, rounds: bool) -> onnx_ir.Model:
    """The model as a graph of standard operators.

    Inputs have the names of the example's tensors, outputs those of the request, and dynamic dimensions their own.

    Args:
        request: what to export.
        rounds: whether activations are rounded by standard operators, as each layer's method says.

    Raises:
        ExportError: torch cannot export the model, or ONNX has no operator for something in it.
    """
    for name, tensor in request.example.tensors().items():
        _refuse_complex(f"the example input {name}", tensor)
    with onnx_forms(request.module, rounds):
        program = exported_program(request, _tensors_alone)
    with errors_logged_alone("torch.onnx", "onnxscript", "onnx_ir"):
        model: onnx_ir.Model = _translated(program, request).model
        _name_dimensions(model, request)
        tidy(model)
    return model


def _tensors_alone(outputs: Any, taken: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors of the outputs and nothing else.

    An input that is returned, or a tensor that is returned twice, is a copy: each output of a graph has its own name.
    """
    known, found = {id(tensor) for tensor in taken}, []
    for tensor in tensors_of(outputs):
        _refuse_complex("an output of the model", tensor)
        found.append(tensor.clone() if id(tensor) in known else tensor)
        known.add(id(tensor))
    return tuple(found)


def _refuse_complex(what: str, tensor: Tensor) -> None:
    if tensor.is_complex():
        raise ExportError(
            f"{what} is complex, and ONNX has no complex numbers: let a method take and return torch.view_as_real of "
            "them, and name it as method="
        )


def _translated(program: torch.export.ExportedProgram, request: Request) -> Any:
    try:
        return torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=input_names(request),
            output_names=list(request.output_names),
            optimize=False,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"torch cannot write the model as ONNX: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What was the first to fail, in one line: torch tells of the steps of exporting around it."""
    while error.__cause__ is not None:
        error = error.__cause__  # type: ignore[assignment]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:600]}"


def input_names(request: Request) -> list[str]:
    """The names of the inputs in the order in which the graph has them."""
    names = {id(tensor): name for name, tensor in request.example.tensors().items()}
    leaves = pytree.tree_leaves((request.example.args, request.example.kwargs))
    return [names[id(leaf)] for leaf in leaves if isinstance(leaf, Tensor)]


def _name_dimensions(model: onnx_ir.Model, request: Request) -> None:
    """Give dynamic dimensions the user's names instead of torch's (``s77``), in inputs and in all that follows."""
    import onnx_ir

    named: dict[str, str] = {}
    for value in model.graph.inputs:
        for place, name in request.dims.places.get(str(value.name), {}).items():
            size = value.shape[place] if value.shape is not None else None
            if isinstance(size, onnx_ir.SymbolicDim) and size.value is not None:
                named[size.value] = name
    if not named:
        return
    pattern = re.compile("|".join(rf"\b{re.escape(each)}\b" for each in named))
    values = [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]
    for value in values:
        if value.shape is None:
            continue
        for place, size in enumerate(value.shape):
            if isinstance(size, onnx_ir.SymbolicDim) and size.value is not None and not value.shape.frozen:
                value.shape[place] = pattern.sub(lambda found: named[found[0]], size.value)


def save_graph(graph: onnx_ir.Model, path: str) -> None:
    """Write a graph to a file, and its weights to a second one beside it if they are too large."""
    import onnx_ir

    held = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value is not None)
    beside = None if held < _LARGEST_FILE else f"{os.path.basename(path)}.data"
    onnx_ir.save(graph, path, external_data=beside)
