"""ONNX files: written with int8 codes as initializers, and run in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinyq_lightning.handover.example import Example
from tinyq_lightning.handover.onnx_calibration import static_graph
from tinyq_lightning.handover.onnx_four_bits import pack_four_bits
from tinyq_lightning.handover.onnx_graph import onnx_graph, save_graph
from tinyq_lightning.handover.request import Request

if TYPE_CHECKING:
    import onnx_ir

__all__ = [
    "ONNX_EXACT",
    "onnx_session",
    "open_onnx",
    "write_onnx",
]

ONNX_EXACT = {"session.qdq_matmulnbits_accuracy_level": "1"}
"""Session options with which ONNX Runtime rounds no activations on its own."""

_WEIGHTS_NOTE = (
    "ONNX Runtime rounds the activations that it multiplies by DequantizeLinear weights, to int8 in blocks of 32. The "
    "session option session.qdq_matmulnbits_accuracy_level = 1 keeps them in float32, much slower for few rows; "
    "session.disable_quant_qdq = 1 expands the weights when it loads the file: the speed and the memory of float32."
)
_CONVOLUTIONS_NOTE = (
    "ONNX Runtime computes convolutions of DequantizeLinear weights in float32, and dequantizes the weights on each "
    "call unless session.disable_quant_qdq = 1 has it keep them as float32. With activations='static' it computes in "
    "int8."
)
_SIGNED_NOTE = "ONNX Runtime fuses fewer convolutions with int8 activations than with uint8, as 'static' has them."
_DIGITS_NOTE = (
    "On a processor without VNNI instructions the int8 products of ONNX Runtime may saturate: the session option "
    "session.x64quantprecision = 1 has it take slower ones that do not."
)


def write_onnx(request: Request, path: str) -> Sequence[str]:
    """Write an ``.onnx`` file, and check it with ONNX's own checker and shape inference.

    A model of more than 1.9 GB has its weights in ``<name>.onnx.data`` beside it.
    """
    import onnx

    is_static = request.activations != "dynamic"
    graph = static_graph(request, _float_runner) if is_static else onnx_graph(request, rounds=True)
    if not is_static:
        pack_four_bits(graph, request.module, expands=True)
    save_graph(graph, path)
    onnx.checker.check_model(path, full_check=True)
    return _notes(graph, request.activations)


def _notes(graph: onnx_ir.Model, activations: str) -> list[str]:
    if activations != "dynamic":
        return [_DIGITS_NOTE] + [_SIGNED_NOTE] * (activations == "static-signed")
    readers = {
        use.node.op_type for node in graph.graph if node.op_type == "DequantizeLinear" for use in node.outputs[0].uses()
    }
    used = {node.op_type for node in graph.graph}
    notes = [_WEIGHTS_NOTE] * ("MatMul" in readers) + [_CONVOLUTIONS_NOTE] * ("Conv" in readers)
    return notes + [_DIGITS_NOTE] * ("MatMulInteger" in used)


def open_onnx(path: str, request: Request) -> Callable[[Example], Sequence[Tensor]]:
    """Load an ``.onnx`` file into ONNX Runtime, on the CPU."""
    session = onnx_session(path, request.threads, request.settings)
    taken = {each.name for each in session.get_inputs()}

    def run(example: Example) -> Sequence[Tensor]:
        feed = {name: tensor.numpy() for name, tensor in example.tensors().items() if name in taken}
        return [torch.from_numpy(output) for output in session.run(None, feed)]

    return run


def _float_runner(path: str) -> Callable[[Mapping[str, Any]], Sequence[Any]]:
    session = onnx_session(path, torch.get_num_threads(), {"session.disable_quant_qdq": "1"})
    return lambda feed: session.run(None, feed)


def onnx_session(path: str, threads: int, settings: Mapping[str, str] | None = None) -> Any:
    """A session of ONNX Runtime on the CPU, with so many threads, which logs errors only."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    for name, value in (settings or {}).items():
        options.add_session_config_entry(name, value)
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
