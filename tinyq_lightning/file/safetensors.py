"""Writes quantized checkpoints as safetensors files, which other languages read, and reads them without loss.

Tensors have their names of the state dict. The rest of the checkpoint is JSON in the metadata: ``tinyq`` for
other readers, and ``checkpoint``, from which the same checkpoint can be made again.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tinyq_lightning.errors import CheckpointError, MissingExtraError
from tinyq_lightning.file.checkpoint import check_digests
from tinyq_lightning.file.durable import replace_file
from tinyq_lightning.file.plain import plain, plain_state
from tinyq_lightning.file.validate import check_format, check_layers

__all__ = [
    "is_safetensors",
    "read_safetensors",
    "write_safetensors",
]

_Names = dict[tuple[Any, ...], str]
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}

_NO_LIBRARY = "safetensors files need the package safetensors: pip install 'tinyq-lightning[safetensors]'"


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """True for the name of a safetensors file."""
    return os.fspath(path).lower().endswith(".safetensors")


def write_safetensors(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a quantized checkpoint as a safetensors file. The file is complete or is not there.

    Tensors with the same memory and layout are written once; ``checkpoint`` gives their other names. Tensors that
    share memory in another layout, such as a weight and its transpose, are each written.

    Args:
        content: of a quantized checkpoint.
        path: a local path or a URL that fsspec can open.

    Raises:
        CheckpointError: the file could not be written.
        MissingExtraError: safetensors is not installed.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise MissingExtraError(_NO_LIBRARY) from error
    tensors: dict[str, Tensor] = {}
    names: _Names = {}
    storages: set[int] = set()
    for name, value in content["state_dict"].items():
        if isinstance(value, Tensor) and names.setdefault(_memory(value), name) == name:
            values = value.contiguous()
            storage = values.untyped_storage()._cdata
            tensors[name] = values.clone() if storage in storages else values  # safetensors refuses shared memory
            storages.add(storage)
    encoded = _encoded({**content, "state_dict": dict(content["state_dict"])}, tensors, names)
    metadata = {
        "format": "pt",
        "tinyq": json.dumps(content["tinyq"], sort_keys=True),
        "checkpoint": json.dumps(encoded),
        "state_dict_metadata": json.dumps(_encoded(getattr(content["state_dict"], "_metadata", None), {}, {})),
    }
    data = save(tensors, metadata)
    replace_file(path, lambda file: file.write(data))


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :func:`write_safetensors` wrote.

    Args:
        path: a local file.

    Returns:
        The content of the quantized checkpoint, for :func:`~tinyq_lightning.file.checkpoint.write_checkpoint`.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it did not come from a quantized checkpoint.
        MissingExtraError: safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise MissingExtraError(_NO_LIBRARY) from error
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if "checkpoint" not in metadata:
                raise CheckpointError(f"{path}: it was not exported from a quantized checkpoint")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        content: dict[str, Any] = plain(_decoded(json.loads(metadata["checkpoint"]), tensors))
        state_dict = OrderedDict(content["state_dict"])
        vars(state_dict)["_metadata"] = plain(_decoded(json.loads(metadata["state_dict_metadata"]), {}))
        content["state_dict"] = plain_state(state_dict)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file") from error
    except (
        OSError,
        SafetensorError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
    ) as error:
        raise CheckpointError(f"{path}: the file is damaged: {error}") from error
    check_format(content, path)
    check_digests(content, path)
    check_layers(content, path)
    return content


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same values in the same memory."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _encoded(value: Any, tensors: dict[str, Tensor], names: _Names) -> Any:
    """``value`` as JSON. A type that JSON lacks becomes an object with one key, the name of the type."""

    def inner(item: Any) -> Any:
        return _encoded(item, tensors, names)

    if isinstance(value, Tensor):
        name = names.setdefault(_memory(value), f"tensor.{len(tensors)}")
        tensors.setdefault(name, value.clone(memory_format=torch.contiguous_format))
        # The file holds contiguous tensors only, and a checkpoint others as well, such as channels_last.
        return {"tensor": name} if value.is_contiguous() else {"strided": [name, list(value.stride())]}
    if isinstance(value, dict):
        return {type(value).__name__: [[inner(key), inner(item)] for key, item in value.items()]}
    if isinstance(value, list):
        return [inner(item) for item in value]
    if isinstance(value, tuple | set):
        return {type(value).__name__: [inner(item) for item in value]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": [inner(value.real), inner(value.imag)]}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, torch.dtype | torch.device):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    return value


def _with_strides(tensor: Tensor, strides: list[int]) -> Tensor:
    """``tensor`` in memory of the given strides, which must leave no gaps."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    if reach != tensor.numel() or min(strides) < 0:
        raise ValueError(f"strides {strides} do not fit a tensor of shape {list(tensor.shape)}")
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "strided":
        name, strides = held
        return _with_strides(tensors[name], strides)
    if kind == "bytes":
        return base64.b64decode(held)
    if kind == "dtype":
        return _DTYPES[held]
    if kind in ("float", "device"):
        return float(held) if kind == "float" else torch.device(held)
    items = [_decoded(item, tensors) for item in held]
    if kind == "complex":
        return complex(*items)
    kinds: dict[str, Any] = {"dict": dict, "OrderedDict": OrderedDict, "tuple": tuple, "set": set}
    return kinds[kind](items)
