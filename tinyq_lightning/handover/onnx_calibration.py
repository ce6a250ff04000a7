"""Ranges of a graph's activations over calibration inputs, and the graph that is rounded by them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from tinyq_lightning.errors import ExportError
from tinyq_lightning.handover.example import as_arguments
from tinyq_lightning.handover.onnx_graph import input_names, onnx_graph, save_graph
from tinyq_lightning.handover.onnx_static import add_pairs, static_places, with_ranges
from tinyq_lightning.handover.request import Request

if TYPE_CHECKING:
    import onnx_ir

__all__ = [
    "Runner",
    "static_graph",
]

Runner = Callable[[str], Callable[[Mapping[str, Any]], Sequence[Any]]]
"""Loads an ONNX file in float32: returns a function from arrays by input name to those of the outputs."""


def static_graph(request: Request, runner: Runner) -> onnx_ir.Model:
    """The model as a graph whose products have rounded inputs, by ranges from the calibration inputs.

    Raises:
        ExportError: nothing is to be rounded, or the calibration inputs do not fit.
    """
    model = onnx_graph(request, rounds=False)
    places = static_places(model.graph)
    values = places.values
    if not values:
        raise ExportError("activations='static': the model has no linear layer or convolution whose input is rounded")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "ranges.onnx")
        save_graph(with_ranges(model, values), path)
        run = runner(path)
        found = [np.stack([np.asarray(each) for each in run(feed)]) for feed in _feeds(request)]
    if not found:
        raise ExportError("activations='static': the calibration gave no inputs")
    lowest, highest = np.min(found, axis=0)[::2], np.max(found, axis=0)[1::2]
    if not (np.isfinite(lowest).all() and np.isfinite(highest).all()):
        raise ExportError("activations='static': the calibration inputs led to NaN or infinity in the model")
    ranges = {value: (float(low), float(high)) for value, low, high in zip(values, lowest, highest, strict=True)}
    add_pairs(model, places, ranges, signed=request.activations == "static-signed")
    return model


def _feeds(request: Request) -> Iterator[dict[str, Any]]:
    names = input_names(request)
    kinds = [tensor.dtype for tensor in _tensors(request.example.args, request.example.kwargs)]
    for index, given in enumerate(() if request.calibration is None else request.calibration):
        args, kwargs = as_arguments(given)
        if kwargs.keys() == request.example.kwargs.keys():
            kwargs = {name: kwargs[name] for name in request.example.kwargs}
        known = request.example.parameters
        if unknown := [name for name in kwargs if name not in known]:
            raise ExportError(f"calibration input {index} names {unknown[0]!r}, and the inputs are {', '.join(known)}")
        tensors = _tensors(args, kwargs)
        if len(tensors) != len(names):
            raise ExportError(
                f"calibration input {index} has {len(tensors)} tensors, and the example {len(names)}: "
                f"{', '.join(names)}; each is to be like example_inputs"
            )
        yield {
            name: each.detach().to("cpu", kind).numpy() for name, kind, each in zip(names, kinds, tensors, strict=True)
        }


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
