"""Leaves a model as it was, whatever running and tracing it changed."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinyq_lightning.layers import QuantizedLayer
from tinyq_lightning.search import evaluating

__all__ = [
    "untouched",
]

_CONTAINERS = (dict, OrderedDict, list, set)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Context manager in which a model is in eval mode, without gradients; then everything is as before.

    Modes, attributes, hooks, buffers, gradients and the state of the random number generators are put back. The forms
    that quantized layers make of their codes when they are first called are kept. ``nn.TransformerEncoder`` computes
    padded tokens as all others, instead of leaving zeros there, because graphs have no nested tensors.
    """
    apart = {below for layer in model.modules() if isinstance(layer, QuantizedLayer) for below in layer.modules()}
    modules = [each for each in model.modules() if each not in apart]
    attributes = [(each, _attributes(each)) for each in modules]
    buffers = [(buffer, buffer.clone(), _version(buffer)) for each in modules for buffer in each.buffers(recurse=False)]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with evaluating(model), torch.no_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        for module, (values, contents) in attributes:
            _put_back(module, values, contents)
        for buffer, before, version in buffers:
            if version is None or _version(buffer) != version:
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(before)


def _version(tensor: Tensor) -> int | None:
    """A number that grows with each write; None if torch does not count them."""
    return None if tensor.is_inference() else tensor._version


def _attributes(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The attributes, and copies of those that hold others."""
    values = dict(vars(module))
    return values, {name: value.copy() for name, value in values.items() if type(value) in _CONTAINERS}


def _put_back(module: nn.Module, values: dict[str, Any], contents: dict[str, Any]) -> None:
    for name, content in contents.items():
        held = values[name]
        if isinstance(held, list):
            held[:] = content
        else:
            held.clear()
            held.update(content)
    vars(module).clear()
    vars(module).update(values)
