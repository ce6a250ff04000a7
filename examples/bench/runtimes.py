"""A network in ONNX Runtime and in OpenVINO, with their own int8: functions as in :mod:`graphs`."""

from functools import cache, partial
from pathlib import Path

import graphs
import torch
from graphs import any_size, folder
from torch import Tensor, nn


@cache
def onnx_file(network: nn.Module) -> Path:
    ids, path = torch.zeros(2, 16, dtype=torch.int64), folder() / "float32.onnx"
    shapes = any_size(ids)
    torch.onnx.export(network, (ids,), path, dynamo=True, dynamic_shapes=shapes, opset_version=21, verbose=False)
    return path


def onnxruntime(precision: str, network: nn.Module, ids: Tensor):
    import onnxruntime as ort
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = onnx_file(network)
    if precision == "int8":
        path = folder() / "int8.onnx"
        quantize_dynamic(onnx_file(network), path, weight_type=QuantType.QInt8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda ids: torch.from_numpy(session.run(None, {name: ids.numpy()})[0])


def openvino(precision: str, network: nn.Module, ids: Tensor):
    import openvino

    core = openvino.Core()
    model = core.read_model(onnx_file(network))
    if precision == "weights":
        import nncf

        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    elif precision == "calibrated":
        import nncf

        samples = nncf.Dataset([each[None].numpy() for each in ids.flatten().split(64)])
        model = nncf.quantize(model, samples, model_type=nncf.ModelType.TRANSFORMER)
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    ready = core.compile_model(model, "CPU", settings)
    return lambda ids: torch.from_numpy(ready([ids.numpy()])[0].copy())


BUILDS = {
    **graphs.BUILDS,
    "ONNX Runtime float32": partial(onnxruntime, "float32"),
    "ONNX Runtime int8": partial(onnxruntime, "int8"),
    "OpenVINO float32": partial(openvino, "float32"),
    "OpenVINO int8 weights": partial(openvino, "weights"),
    "OpenVINO int8 calibrated": partial(openvino, "calibrated"),
}


def build(network: nn.Module, ids: Tensor, names: list[str]) -> tuple[dict, list[dict]]:
    """Each runtime's version of ``network``, and a cell for each that cannot be made, with the reason."""
    made, failed = {}, []
    for name in names:
        try:
            made[name] = BUILDS[name](network, ids)
        except Exception as failure:
            failed.append({"contender": name, "failed": f"{type(failure).__name__}: {failure}".splitlines()[0]})
    return made, failed
