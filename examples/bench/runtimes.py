"""The same network in a graph: compiled, as an AOTInductor package, in ONNX Runtime and in OpenVINO, by one thread.

Each function takes the float32 network, which maps token ids to hidden states, with ids ``[batch, tokens]`` as an
example, and returns a callable that does the same. Files lie in a folder that goes with the process. What is not
installed, or has no compiler, fails with the reason.
"""

import atexit
import copy
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tinyq_lightning import quantize

Run = Callable[[Tensor], Tensor]
Build = Callable[[nn.Module, Tensor], Run]


@cache
def folder() -> Path:
    made = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def dynamic(ids: Tensor) -> dict[int, torch.export.Dim]:
    most = (128, 256)
    return {place: torch.export.Dim(f"size{place}", min=1, max=most[place]) for place in range(ids.dim())}


def compiled(method: str, network: nn.Module, ids: Tensor) -> Run:
    network = copy.deepcopy(network)
    if method != "float32":
        quantize(network, method)
    return torch.compile(network)


def packaged(method: str, network: nn.Module, ids: Tensor) -> Run:
    """An AOTInductor package for this processor, for any batch and number of tokens."""
    import torch._inductor

    network = copy.deepcopy(network)
    if method != "float32":
        quantize(network, {"method": method, "kernel": "int8"})  # the processor's int8 products in the program too
    program = torch.export.export(network, (ids,), dynamic_shapes=(dynamic(ids),))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder() / f"{method}.pt2"))
    return torch._inductor.aoti_load_package(path)


@cache
def onnx_file(network: nn.Module) -> Path:
    ids, path = torch.zeros(2, 16, dtype=torch.int64), folder() / "float32.onnx"
    torch.onnx.export(
        network, (ids,), path, dynamo=True, dynamic_shapes=(dynamic(ids),), opset_version=21, verbose=False
    )
    return path


def onnxruntime(precision: str, network: nn.Module, ids: Tensor) -> Run:
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


def openvino(precision: str, network: nn.Module, ids: Tensor) -> Run:
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


METHODS = ("float32", "w8a32", "w8a16", "w8a8")


BUILDS: dict[str, Build] = {
    **{f"{method} compiled": partial(compiled, method) for method in METHODS},
    **{f"{method} AOTInductor": partial(packaged, method) for method in METHODS},
    "ONNX Runtime float32": partial(onnxruntime, "float32"),
    "ONNX Runtime int8": partial(onnxruntime, "int8"),
    "OpenVINO float32": partial(openvino, "float32"),
    "OpenVINO int8 weights": partial(openvino, "weights"),
    "OpenVINO int8 calibrated": partial(openvino, "calibrated"),
}


def build(network: nn.Module, ids: Tensor, names: list[str]) -> tuple[dict[str, Run], list[dict]]:
    """Each runtime's version of ``network``, and a cell for each that cannot be made, with the reason."""
    made: dict[str, Run] = {}
    failed = []
    for name in names:
        try:
            made[name] = BUILDS[name](network, ids)
        except Exception as failure:
            why = f"{type(failure).__name__}: {failure}".splitlines()[0]
            failed.append({"contender": name, "failed": why})
    return made, failed
