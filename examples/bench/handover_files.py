"""The files of the part ``handover``: the text encoder in each format, and what other tools make of it."""

import copy
from pathlib import Path

import torch
from text_encoder import Encoder
from torch import Tensor

from tinyq_lightning import TinyQError, export, quantize
from tinyq_lightning.handover import FORMATS

EXPORTS = [
    ("onnx", "w8a32"),
    ("onnx", "w8a16"),
    ("onnx", "w8a8"),
    ("onnx", "w4a32"),
    ("onnx", "w4a8"),
    ("openvino", "w8a8"),
    ("openvino", "w4a32"),
    ("pt2", "w8a8"),
    ("aoti", "w8a8"),
]
SIZES = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("tokens", min=1, max=512)}


def written(encoder: Encoder, ids: Tensor, folder: Path, exports: list) -> tuple[dict, list[dict]]:
    """The kind and the path of each file, and a cell for each that cannot be made, with the reason."""
    files, failed = {"float32 onnx": ("onnx", folder / "float32.onnx")}, []
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    place = files["float32 onnx"][1]
    torch.onnx.export(
        encoder, (ids,), place, dynamic_shapes=dynamic, opset_version=21, verbose=False, external_data=False
    )
    if ("openvino", "w8a8") in exports:
        files["float32 openvino"] = "openvino", place
        files |= _compressed(place, folder)
    for kind, method in exports:
        name, network = f"{kind} {method}", copy.deepcopy(encoder)
        quantize(network, method)
        path = folder / f"{method}{FORMATS[kind].ending}"
        try:
            export(network, path, ids, to=kind, dynamic=SIZES, max_error=0.2)
            files[name] = kind, path
        except TinyQError as failure:
            failed.append({"part": "handover", "contender": name, "failed": str(failure).splitlines()[0]})
    return files, failed


def _compressed(place: Path, folder: Path) -> dict:
    """OpenVINO's own way to int8 weights, if it is installed."""
    try:
        import nncf
        import openvino
    except ModuleNotFoundError:
        return {}
    model = nncf.compress_weights(openvino.Core().read_model(place), mode=nncf.CompressWeightsMode.INT8_SYM)
    openvino.save_model(model, folder / "nncf.xml", compress_to_fp16=False)
    return {"nncf openvino": ("openvino", folder / "nncf.xml")}
