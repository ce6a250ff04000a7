"""What quantizing does to each layer's output on real batches: all layers in one forward pass, through hooks."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from tinyq_lightning.layers import QuantizedLinear
from tinyq_lightning.plan import Swap
from tinyq_lightning.search.budget import LADDER

__all__ = [
    "SIGNAL_BATCHES",
    "LayerError",
    "measured_layers",
]

SIGNAL_BATCHES = 4
"""What layers are measured on."""


@dataclass
class LayerError:
    """One layer on the batches it saw, with the inputs it has in the float model.

    Attributes:
        output_sqnr_db: by method, in dB: variance of the float outputs, each feature about its own mean,
            over the mean square of the int8 outputs' error. A constant carries no information, and would
            hide the loss of what does.
        crest: mean over the tokens of ``max|x| / rms(x)``. An int8 token has an SQNR of about
            ``52.87 − 20·log10(crest)`` dB.
        float_ms: median time of the float layer on a batch, in milliseconds.
        ms: the same of the quantized layer, by method.
    """

    output_sqnr_db: dict[str, float] = field(default_factory=dict)
    crest: float = math.nan
    float_ms: float = math.nan
    ms: dict[str, float] = field(default_factory=dict)


@contextmanager
def measured_layers(swap: Swap) -> Iterator[dict[str, LayerError]]:
    """Watch every layer of ``swap``, on the inputs that it is given while the model runs inside the block.

    Args:
        swap: in or out: the layers are measured with the inputs of whichever model runs.

    Yields:
        A dict that holds, after the block, what was seen of each layer that was called, by its name.
    """
    errors: dict[str, LayerError] = {}
    watches = {name: _Watch(module, layer) for name, module, layer in swap.pairs()}
    handles = []
    for name, module, layer in swap.pairs():
        places = {id(each._forward_hooks): each for each in (module, layer)}  # a Linear shares its hooks with its layer
        handles += [place.register_forward_hook(watches[name].look, with_kwargs=True) for place in places.values()]
    try:
        yield errors
    finally:
        for handle in handles:
            handle.remove()
        errors |= {name: watch.error() for name, watch in watches.items() if watch.tokens}


class _Watch:
    """Sums over the calls of one layer."""

    def __init__(self, module: nn.Module, layer: QuantizedLinear) -> None:
        self._module = module
        self._layers = {method: layer.with_method(method) for method in LADDER[:-1]}
        self._noise = dict.fromkeys(self._layers, 0.0)
        self._sum: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0
        self._crest = 0.0
        self._seconds: Mapping[str, list[float]] = {name: [] for name in ("float", *self._layers)}
        self.tokens = 0

    def look(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A forward hook: run the float layer, and the quantized one by every method, on the inputs given."""
        x = args[0] if args else next(iter(kwargs.values()))
        with torch.no_grad():
            expected = self._timed("float", self._module, args, kwargs)
            for method, layer in self._layers.items():
                error = self._timed(method, layer.to(x.device), args, kwargs) - expected
                self._noise[method] += error.square().sum().item()
            self._sum = self._sum + expected.sum(0)
            self._squares = self._squares + expected.square().sum(0)
            rows = _tokens(x)
            crest = rows.abs().amax(1) / rows.square().mean(1).sqrt().clamp_min(torch.finfo(rows.dtype).tiny)
            self._crest += crest.sum().item()
            self.tokens += len(expected)

    def _timed(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Tensor:
        start = time.perf_counter()
        output = module.forward(*args, **kwargs)  # not module(...): its hooks, this one among them, would run again
        self._seconds[name].append(time.perf_counter() - start)
        return _tokens(output)

    def error(self) -> LayerError:
        squares, total = torch.as_tensor(self._squares), torch.as_tensor(self._sum)
        signal = (squares - total.square() / self.tokens).clamp_min(0).sum().item()
        ms = {name: 1000 * median(seconds) for name, seconds in self._seconds.items()}
        return LayerError(
            {method: _decibels(signal, noise) for method, noise in self._noise.items()},
            self._crest / self.tokens,
            ms.pop("float"),
            ms,
        )


def _tokens(output: Any) -> Tensor:
    """``[tokens, features]`` float64 of a layer's input or output; the first where it is several."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor.detach().cpu().double().reshape(-1, tensor.shape[-1] if tensor.dim() else 1)


def _decibels(signal: float, noise: float) -> float:
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
