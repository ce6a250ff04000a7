"""How long a quantized model takes, beside the same model with float layers, on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from tinyq_lightning.errors import EvaluationError
from tinyq_lightning.plan import Site, find_sites

__all__ = [
    "Timing",
    "example_input",
    "time_layers",
    "time_model",
]

_WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """One model, or one layer of it, on one batch.

    Attributes:
        name: of the layer; empty for the model.
        batch: how many samples are in the batch.
        float_ms: median time of one batch with float layers, in milliseconds.
        int8_ms: the same with quantized layers.
    """

    name: str
    batch: int
    float_ms: float
    int8_ms: float

    @property
    def samples_per_second(self) -> tuple[float, float]:
        """Throughput, float and quantized."""
        return self.batch / self.float_ms * 1e3, self.batch / self.int8_ms * 1e3


def example_input(module: LightningModule, shape: Sequence[int] | None, batch: int) -> tuple[Any, ...]:
    """Arguments of ``forward`` for ``batch`` samples.

    Args:
        module: with an ``example_input_array``, unless a shape is given.
        shape: of one sample, which is drawn at random as float32.
        batch: how many samples.

    Raises:
        EvaluationError: there is neither.
    """
    if shape is not None:
        return (torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)),)
    given = module.example_input_array
    if given is None:
        raise EvaluationError(
            f"{type(module).__name__} has no example_input_array: set it in __init__, or give the shape of one sample "
            "with --shape"
        )
    if isinstance(given, Mapping):
        raise EvaluationError("an example_input_array that is a mapping is not supported: give --shape")
    return tuple(_of_size(each, batch) for each in (given if isinstance(given, tuple) else (given,)))


def _of_size(value: Any, batch: int) -> Any:
    """The first ``batch`` samples of ``value``, those it has over and over where they are too few."""
    if not isinstance(value, Tensor) or not value.dim():
        return value
    return value.repeat(-(-batch // len(value)), *[1] * (value.dim() - 1))[:batch]


def time_model(
    quantized: nn.Module, float_model: nn.Module, arguments: tuple[Any, ...], batch: int, runs: int
) -> Timing:
    """Median time of ``forward``, the two models taking turns, so that the machine's moods meet both.

    Args:
        quantized: in eval mode.
        float_model: in eval mode.
        arguments: of ``forward``.
        batch: how many samples they hold.
        runs: how often each model runs, after three runs to warm up.

    Raises:
        EvaluationError: ``forward`` does not take such an input.
    """
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for run in range(_WARM_UP + runs):
            for model, taken in zip((float_model, quantized), times, strict=True):
                begin = time.perf_counter()
                try:
                    model(*arguments)
                except Exception as error:
                    shapes = ", ".join(str(list(each.shape)) for each in arguments if isinstance(each, Tensor))
                    name = type(model).__name__
                    raise EvaluationError(f"forward of {name} failed on an input of shape {shapes}: {error}") from error
                if run >= _WARM_UP:
                    taken.append((time.perf_counter() - begin) * 1e3)
    return Timing("", batch, median(times[0]), median(times[1]))


def time_layers(
    quantized: nn.Module, float_model: nn.Module, arguments: tuple[Any, ...], batch: int, runs: int
) -> list[Timing]:
    """As :func:`time_model` for each layer that was quantized, on the inputs it gets inside the model.

    A layer that runs several times in one forward pass is timed on its last input.
    """
    inputs: dict[str, tuple[Any, ...]] = {}
    sites = {site.name: site for site in find_sites(quantized)}
    floats = {site.name: site for site in find_sites(float_model)}
    changed = [
        name for name, site in sites.items() if name in floats and type(floats[name].module) is not type(site.module)
    ]
    handles = [sites[name].module.register_forward_pre_hook(_note(inputs, name)) for name in changed]
    with torch.inference_mode():
        quantized(*arguments)
    for handle in handles:
        handle.remove()

    def timed(name: str, site: Site, other: Site) -> Timing:
        found = time_model(site.module, other.module, inputs[name], batch, runs)
        return Timing(name, batch, found.float_ms, found.int8_ms)

    return [timed(name, sites[name], floats[name]) for name in changed if name in inputs]


def _note(inputs: dict[str, tuple[Any, ...]], name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs[name] = arguments

    return hook
