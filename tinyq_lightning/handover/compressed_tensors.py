"""Folders of a Hugging Face model in the layout of compressed-tensors, which ``from_pretrained`` reads.

Linear layers are written as their codes: those of ``w8a8`` as ``int-quantized``, with activations quantized to int8 per
token as they come; of other methods as ``pack-quantized``, weights only. Layers of other kinds, and weights that
several layers share, are written as floats, since the layout knows linear layers alone.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from tinyq_lightning.errors import ExportError
from tinyq_lightning.handover.example import Example
from tinyq_lightning.handover.outputs import tensors_of
from tinyq_lightning.handover.request import Request
from tinyq_lightning.layers import QuantizedLayer, QuantizedLinear

__all__ = [
    "open_compressed_tensors",
    "write_compressed_tensors",
]

_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
_TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def write_compressed_tensors(request: Request, path: str) -> Sequence[str]:
    """Write ``config.json`` and ``model.safetensors`` into a folder.

    Raises:
        ExportError: there is no Hugging Face model in the module, or several; or no linear layer of it is quantized.
    """
    from safetensors.torch import save_file

    _, model = _pretrained(request.module)
    skeleton = _skeleton(model)
    coded = {name: layer for name, layer in _quantized(model) if _is_coded(name, layer, model, skeleton)}
    if not coded:
        raise ExportError(
            f"no linear layer of {type(model).__name__} is quantized for itself, and compressed-tensors knows linear "
            "layers alone"
        )
    config = copy.deepcopy(model.config)
    config.quantization_config = _quantization_config(model, skeleton, coded)
    config.architectures = [type(model).__name__]
    config.save_pretrained(path)
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(path)
    save_file(_tensors(model, skeleton, coded), f"{path}/model.safetensors", {"format": "pt"})
    left = [name for name, _ in _quantized(model) if name not in coded]
    notes = ["transformers decompresses the weights when the model is first called; servers such as vLLM keep int8"]
    if any(layer.method == "w8a16" for layer in coded.values()):
        notes.append("activations of w8a16 are taken as they are: the layout has no 16-bit ones")
    if any(layer.method == "w8a8" for layer in coded.values()):
        notes.append("activations of w8a8 are rounded by the library's own steps, which differ a little")
    if made := _made_by_auto_model(model):
        notes.append(
            f"load it by {type(model).__name__}.from_pretrained: AutoModel makes a {made}, of which it is a part"
        )
    if left:
        notes.append(f"written as floats, since the layout knows linear layers alone: {', '.join(left)}")
    return notes


def _made_by_auto_model(model: Any) -> str | None:
    """The class that AutoModel would make, if it is neither the model's nor that of what it holds."""
    from transformers import AutoModel

    made: Any = AutoModel._model_mapping.get(type(model.config), None)
    choices = made if isinstance(made, tuple) else (made,)
    known = made is None or any(isinstance(each, choices) for each in model.modules())
    return None if known else str(choices[0].__name__)


def _pretrained(module: nn.Module) -> tuple[str, Any]:
    """The one Hugging Face model in a module that is in no other, with its name there."""
    from transformers import PreTrainedModel

    found: dict[str, nn.Module] = {}
    for name, each in module.named_modules():
        inside = any(above == "" or name.startswith(f"{above}.") for above in found)
        if isinstance(each, PreTrainedModel) and not inside:
            found[name] = each
    if len(found) != 1:
        what = "holds none" if not found else f"holds several: {', '.join(found)}; export one of them"
        raise ExportError(f"compressed-tensors is for a Hugging Face model, and {type(module).__name__} {what}")
    return next(iter(found.items()))


def _skeleton(model: Any) -> nn.Module:
    """The float model without values: what ``from_pretrained`` makes before it reads the weights."""
    with torch.device("meta"):
        skeleton: nn.Module = type(model)(copy.deepcopy(model.config))
    return skeleton


def _quantized(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The quantized layers, each by its first name."""
    return ((name, each) for name, each in model.named_modules() if isinstance(each, QuantizedLayer))


def _is_coded(name: str, layer: QuantizedLayer, model: nn.Module, skeleton: nn.Module) -> bool:
    """Whether a layer is an ``nn.Linear`` of the float model that shares its weight with no other."""
    try:
        linear = isinstance(skeleton.get_submodule(name), nn.Linear)
    except AttributeError as error:
        raise ExportError(f"{name}: compressed-tensors has no layout for {type(layer).__name__}") from error
    if not linear or not isinstance(layer, QuantizedLinear):
        return False
    place = layer.scales.untyped_storage()._cdata
    others = (other for _, other in _quantized(model) if other is not layer)
    return all(
        each.scales.untyped_storage()._cdata != place for other in others for each in other.coded_weights().values()
    )


def _quantization_config(model: nn.Module, skeleton: nn.Module, coded: Mapping[str, QuantizedLinear]) -> dict[str, Any]:
    """The entry of ``config.json``: one group for each way of holding activations."""
    by_format: dict[str, list[str]] = {}
    for name, layer in coded.items():
        by_format.setdefault("int-quantized" if layer.method == "w8a8" else "pack-quantized", []).append(name)
    linear = [name for name, each in skeleton.named_modules() if isinstance(each, nn.Linear)]
    left = [name for name in linear if name not in coded]
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if len(by_format) == 1 else [_target(name, prefix) for name in names],
            "weights": _WEIGHTS,
            "input_activations": _TOKENS if form == "int-quantized" else None,
            "format": form,
        }
        for number, (form, names) in enumerate(by_format.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": next(iter(by_format)) if len(by_format) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": sorted({each for name in left for each in (name, name.removeprefix(prefix))}),
    }


def _target(name: str, prefix: str) -> str:
    """A pattern of a layer's name, with the prefix of the base model or without: ``AutoModel`` loads the base alone."""
    return rf"re:^(?:.*\.)?{re.escape(name.removeprefix(prefix))}$"


def _tensors(model: Any, skeleton: nn.Module, coded: Mapping[str, QuantizedLinear]) -> dict[str, Tensor]:
    """The state dict in the layout; a tensor with several names under its first."""
    found: dict[str, Tensor] = {}
    inside = tuple(f"{name}." for name, _ in _quantized(model))
    for name, layer in _quantized(model):
        if name in coded:
            found |= _codes(name, layer)
        else:
            found |= _floats(name, layer, skeleton.get_submodule(name))
        plain = {key: value for key, value in layer.named_parameters(name, recurse=False) if value.numel()}
        found |= {key: value.detach() for key, value in plain.items()}
    found |= {key: value for key, value in model.state_dict().items() if not key.startswith(inside)}
    seen: set[tuple[Any, ...]] = set()
    kept = {}
    for key, value in found.items():
        place = value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape)
        if place not in seen or not value.numel():
            kept[key] = value.contiguous()
        seen.add(place)
    return kept


def _codes(name: str, layer: QuantizedLinear) -> dict[str, Tensor]:
    codes, scales = layer.int8_weights, layer.scales[:, None].clone()
    if layer.method == "w8a8":
        return {f"{name}.weight": codes, f"{name}.weight_scale": scales}
    shape = torch.tensor(codes.shape)
    return {f"{name}.weight_packed": _packed(codes), f"{name}.weight_scale": scales, f"{name}.weight_shape": shape}


def _packed(codes: Tensor) -> Tensor:
    """Codes plus 128, four in each int32, the first in the lowest byte: ``[out, in]`` int8 → ``[out, ⌈in/4⌉]``."""
    rows = nn.functional.pad(codes.to(torch.int32) + 128, (0, -codes.shape[1] % 4)).to(torch.uint8)
    return rows.view(torch.int32)


def _floats(name: str, layer: QuantizedLayer, original: nn.Module) -> dict[str, Tensor]:
    """The dequantized weights of a layer, as the float layer has them."""
    from transformers.pytorch_utils import Conv1D

    found: dict[str, Tensor] = {}
    known: dict[int, Tensor] = {}
    for weight, holder in layer.coded_weights().items():
        values = holder.dequantize().to(layer.dtype)
        turned = isinstance(original, Conv1D)  # whose weight is [in, out]
        found[f"{name}.{weight}"] = known.setdefault(id(holder), values.t() if turned else values)
    return found


def open_compressed_tensors(path: str, request: Request) -> Callable[[Example], Sequence[Tensor]]:
    """Load the folder by ``from_pretrained``; the module then runs with that model in the place of its own."""
    from transformers.utils import logging as messages

    name, model = _pretrained(request.module)
    level = messages.get_verbosity()
    try:
        messages.set_verbosity(logging.ERROR)
        with redirect_stderr(StringIO()):  # bars of the two libraries
            loaded = type(model).from_pretrained(path).eval()
            run = _running(request.module, name, model, loaded)
            run(request.example)  # the first call decompresses
    finally:
        messages.set_verbosity(level)
    return run


def _running(module: nn.Module, name: str, model: Any, loaded: Any) -> Callable[[Example], Sequence[Tensor]]:
    """A function that runs a module with a loaded model in the place of its own."""
    if not name:
        return lambda example: tensors_of(loaded(*example.args, **example.kwargs))
    parent = module.get_submodule(name.rpartition(".")[0])
    attribute = name.rpartition(".")[2]

    def run(example: Example) -> Sequence[Tensor]:
        parent._modules[attribute] = loaded
        try:
            return tensors_of(module(*example.args, **example.kwargs))
        finally:
            parent._modules[attribute] = model

    return run
