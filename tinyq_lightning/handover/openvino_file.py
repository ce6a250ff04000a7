"""OpenVINO's IR: made from the ONNX graph, with int8 constants, and run by OpenVINO."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tinyq_lightning.errors import ExportError
from tinyq_lightning.handover.example import Example
from tinyq_lightning.handover.onnx_calibration import static_graph
from tinyq_lightning.handover.onnx_four_bits import pack_four_bits
from tinyq_lightning.handover.onnx_graph import onnx_graph, save_graph
from tinyq_lightning.handover.onnx_recurrent_weights import expand_recurrent
from tinyq_lightning.handover.request import Request

__all__ = [
    "OPENVINO_EXACT",
    "open_openvino",
    "write_openvino",
]

OPENVINO_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""Properties with which OpenVINO rounds no activations on its own."""

_ROUNDING_NOTE = (
    "OpenVINO multiplies the int8 weights as it finds fastest, whatever the layers' method: it may round activations "
    "to int8 in groups as they come. DYNAMIC_QUANTIZATION_GROUP_SIZE = 0 in the compiled model's properties keeps "
    "them as they are."
)
_PRECISION_NOTE = (
    "On a processor with bfloat16 instructions OpenVINO computes in bfloat16: INFERENCE_PRECISION_HINT = f32 keeps "
    "float32."
)
_RECURRENT_NOTE = (
    "The weights of recurrent layers are float32: OpenVINO takes none in int8 beside static activations. activations = "
    "dynamic keeps them in int8."
)


def write_openvino(request: Request, path: str) -> Sequence[str]:
    """Write an ``.xml`` file and its ``.bin``.

    Raises:
        ExportError: the path has another ending.
    """
    import openvino

    if not path.endswith(".xml"):
        raise ExportError(f"{os.path.basename(path)}: OpenVINO's files are called name.xml and name.bin")
    with tempfile.TemporaryDirectory() as folder:
        onnx_path = os.path.join(folder, "model.onnx")
        is_static = request.activations != "dynamic"
        if is_static:
            graph = static_graph(request, _float_runner)
            expands = expand_recurrent(graph)
        else:
            graph, expands = onnx_graph(request, rounds=False), False
            pack_four_bits(graph, request.module, expands=False)
        save_graph(graph, onnx_path)
        model = openvino.Core().read_model(onnx_path)
        openvino.save_model(model, path, compress_to_fp16=False)
    return [_ROUNDING_NOTE, _PRECISION_NOTE, *[_RECURRENT_NOTE] * expands]


def _float_runner(path: str) -> Callable[[Mapping[str, Any]], Sequence[Any]]:
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", OPENVINO_EXACT)
    return lambda feed: list(compiled(dict(feed)).values())


def open_openvino(path: str, request: Request) -> Callable[[Example], Sequence[Tensor]]:
    """Load an ``.xml`` file into OpenVINO, on the CPU."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": request.threads, "PERFORMANCE_HINT": "LATENCY", **request.settings}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    taken = {each.any_name for each in compiled.inputs}

    def run(example: Example) -> Sequence[Tensor]:
        feed = {name: tensor.numpy() for name, tensor in example.tensors().items() if name in taken}
        found = compiled(feed)
        return [torch.from_numpy(found[place].copy()) for place in range(len(compiled.outputs))]

    return run
