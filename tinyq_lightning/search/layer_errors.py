"""What quantizing does to each layer's output on real batches: all layers in one forward pass, through hooks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from tinyq_lightning.layers import QuantizedLayer, first_tensor, kind_of, methods_of
from tinyq_lightning.methods import LADDER, METHODS
from tinyq_lightning.plan import Swap
from tinyq_lightning.search.timer import brief, evaluating, timed

__all__ = [
    "SIGNAL_BATCHES",
    "LayerError",
    "measured_layers",
]

SIGNAL_BATCHES = 4
"""The number of batches that layers are measured on."""


@dataclass
class LayerError:
    """One layer on the batches that it was called with, with the inputs that it has in the float model.

    Attributes:
        output_sqnr_db: by method, in dB: variance of the float outputs, each feature about its own mean,
            over the mean square of the int8 outputs' error. A constant carries no information, and would
            hide the loss of what does.
        crest: mean over the tokens of ``max|x| / rms(x)``; of a convolution, over the samples. An int8 token has
            an SQNR of about ``52.87 − 20·log10(crest)`` dB. NaN if the inputs are indices.
        float_ms: median time of the float layer on a batch, in milliseconds.
        ms: the same of the quantized layer, by method.
        not_measured: why no call of the layer could be measured, or None. Its figures are empty then.
    """

    output_sqnr_db: dict[str, float] = field(default_factory=dict)
    crest: float = math.nan
    float_ms: float = math.nan
    ms: dict[str, float] = field(default_factory=dict)
    not_measured: str | None = None


@contextmanager
def measured_layers(swap: Swap, *others: Swap) -> Iterator[dict[str, LayerError]]:
    """Measure every layer that is quantized, on the inputs that it is given while the model runs inside the block.

    A layer that cannot be measured never makes the model's own call fail: the reason is noted in
    :attr:`LayerError.not_measured`.

    Args:
        swap: in or out: the layers are measured with the inputs of whichever model runs.
        others: of the same model, out, whose layers have codes of their own.

    Yields:
        A dict that is filled when the block ends: by name, each layer that was called.
    """
    errors: dict[str, LayerError] = {}
    watches: dict[str, _Watch] = {}
    handles = []
    for each in (swap, *others):
        for name, module, layer in each.called():
            if name in watches:
                watches[name].add(each, name, layer)
                continue
            watches[name] = watch = _Watch(module, layer)
            watch.add(each, name, layer)
            # a Linear shares its hooks with its layer
            places = {id(place._forward_hooks): place for place in (module, layer)}
            handles += [place.register_forward_hook(watch.look, with_kwargs=True) for place in places.values()]
    try:
        yield errors
    finally:
        for handle in handles:
            handle.remove()
        errors |= {name: found for name, watch in watches.items() if (found := watch.error())}


def _methods(swap: Swap, layer: QuantizedLayer) -> list[str]:
    """The methods of a layer's bits; if there is a budget, which may ask for more bits, also those of more."""
    climbs = swap.plan.spec.budget is not None
    return [
        method
        for method in LADDER[:-1]
        if method in methods_of(layer)
        and (METHODS[method].bits == layer.bits or (climbs and METHODS[method].bits > layer.bits))
    ]


class _Watch:
    """Sums over the calls of one layer."""

    def __init__(self, module: nn.Module, layer: QuantizedLayer) -> None:
        kind = kind_of(layer)
        assert kind is not None
        self._kind, self._module = kind, module
        self._layers: dict[str, QuantizedLayer] = {}
        self._noise: dict[str, float] = {}
        self._seconds: dict[str, list[float]] = {"float": []}
        self._sum: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0
        self._crest = 0.0
        self._places = self._tokens = 0
        self._failure: str | None = None

    def add(self, swap: Swap, name: str, layer: QuantizedLayer) -> None:
        """Measure the layer of that name by the methods of its bits too; before any call."""
        for method in _methods(swap, layer):
            if method not in self._layers:
                self._layers[method] = swap.layer_by(name, method)
                self._noise[method], self._seconds[method] = 0.0, []

    def look(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A forward hook: run the float layer, and the quantized one by every method, in eval mode on the inputs."""
        if torch.compiler.is_compiling():
            self._failure = "it was called in a compiled graph"
            return
        try:
            with torch.no_grad(), evaluating(self._module, *self._layers.values()):
                self._measure(first_tensor(args, kwargs), args, kwargs)
        except Exception as error:  # of any kind: it must not reach the user's loop, which did nothing wrong
            self._failure = brief(error)

    def _measure(self, x: Tensor, args: Any, kwargs: Any) -> None:
        """Add one call to the sums; a call that fails adds nothing."""
        if x.is_nested:  # the tokens of all its parts in one tensor
            x = torch.cat(x.unbind())
            args, kwargs = (x, *args[1:]), kwargs if args else {}
        if not x.numel():
            return
        # not module(…): its hooks, this one among them, would run again
        output, taken = timed(partial(self._module.forward, *args, **kwargs), x.device)
        expected, seconds, noise = self._features(output), {"float": taken}, {}
        for method, layer in self._layers.items():
            run = partial(layer.to(x.device).forward, *args, **kwargs)
            run()  # the methods share their codes, which are packed anew for each
            output, seconds[method] = timed(run, x.device)
            noise[method] = (self._features(output) - expected).square().sum().item()
        self._add_crest(x)
        self._sum = self._sum + expected.sum(0)
        self._squares = self._squares + expected.square().sum(0)
        for method, value in noise.items():
            self._noise[method] += value
        for name, value in seconds.items():
            self._seconds[name].append(value)
        self._places += len(expected)

    def _features(self, output: Any) -> Tensor:
        """``[places, features]`` float64 of an output; of a tuple, of its first."""
        while isinstance(output, tuple):
            output = output[0]
        return self._kind.features(self._module, output.detach()).cpu().double()

    def _add_crest(self, x: Tensor) -> None:
        tokens = self._kind.tokens(self._module, x)
        if tokens is not None:
            rows = tokens.detach().cpu().double()
            crest = rows.abs().amax(1) / rows.square().mean(1).sqrt().clamp_min(torch.finfo(rows.dtype).tiny)
            self._crest += crest.sum().item()
            self._tokens += len(rows)

    def error(self) -> LayerError | None:
        """What was measured, or why no call could be; None if the layer was not called."""
        if not self._places:
            return LayerError(not_measured=self._failure) if self._failure else None
        squares, total = torch.as_tensor(self._squares), torch.as_tensor(self._sum)
        signal = (squares - total.square() / self._places).clamp_min(0).sum().item()
        ms = {name: 1000 * median(seconds) for name, seconds in self._seconds.items()}
        return LayerError(
            {method: _decibels(signal, noise) for method, noise in self._noise.items()},
            self._crest / self._tokens if self._tokens else math.nan,
            ms.pop("float"),
            ms,
        )


def _decibels(signal: float, noise: float) -> float:
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
