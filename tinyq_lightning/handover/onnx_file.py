"""ONNX files: written with int8 codes as initializers, and run in ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinyq_lightning.handover.example import Example
from tinyq_lightning.handover.onnx_graph import onnx_graph
from tinyq_lightning.handover.request import Request

if TYPE_CHECKING:
    import onnx_ir

__all__ = [
    "onnx_session",
    "open_onnx",
    "save_graph",
    "write_onnx",
]

_LARGEST_FILE = 1_900_000_000
"""Bytes; protobuf refuses messages of 2 GiB."""

_WEIGHTS_NOTE = (
    "ONNX Runtime rounds the activations that it multiplies by DequantizeLinear weights, to int8 in blocks of 32. The "
    "session option session.qdq_matmulnbits_accuracy_level = 1 keeps them in float32, much slower for few rows; "
    "session.disable_quant_qdq = 1 expands the weights when it loads the file: the speed and the memory of float32."
)
_DIGITS_NOTE = (
    "On a processor without VNNI instructions the int8 products of ONNX Runtime may saturate: the session option "
    "session.x64quantprecision = 1 has it take slower ones that do not."
)


def write_onnx(request: Request, path: str) -> Sequence[str]:
    """Write an ``.onnx`` file, and check it with ONNX's own checker and shape inference.

    A model of more than 1.9 GB has its weights in ``<name>.onnx.data`` beside it.
    """
    import onnx

    graph = onnx_graph(request, rounds=True)
    save_graph(graph, path)
    onnx.checker.check_model(path, full_check=True)
    return _notes(graph)


def save_graph(graph: onnx_ir.Model, path: str) -> None:
    """Write a graph to a file, and to a second one if it is too large."""
    import onnx_ir

    held = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value is not None)
    beside = None if held < _LARGEST_FILE else f"{os.path.basename(path)}.data"
    onnx_ir.save(graph, path, external_data=beside)


def _notes(graph: onnx_ir.Model) -> list[str]:
    readers = {
        use.node.op_type
        for node in graph.graph
        if node.op_type == "DequantizeLinear"
        for use in node.outputs[0].uses()
    }
    used = {node.op_type for node in graph.graph}
    return [_WEIGHTS_NOTE] * ("MatMul" in readers) + [_DIGITS_NOTE] * ("MatMulInteger" in used)


def open_onnx(path: str, request: Request) -> Callable[[Example], Sequence[Tensor]]:
    """Load an ``.onnx`` file into ONNX Runtime, on the CPU."""
    session = onnx_session(path, request.threads)
    taken = {each.name for each in session.get_inputs()}

    def run(example: Example) -> Sequence[Tensor]:
        feed = {name: tensor.numpy() for name, tensor in example.tensors().items() if name in taken}
        return [torch.from_numpy(output) for output in session.run(None, feed)]

    return run


def onnx_session(path: str, threads: int) -> Any:
    """A session of ONNX Runtime on the CPU, with so many threads, which logs errors only."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
