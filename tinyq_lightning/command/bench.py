"""Times a quantized model beside the same model with float layers, on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tinyq_lightning.errors import EvaluationError
from tinyq_lightning.plan import find_sites
from tinyq_lightning.search import Timing, time_in_turns

__all__ = [
    "example_input",
    "time_layers",
    "time_model",
]

_WARM_UP = 3


def example_input(module: nn.Module, shape: Sequence[int] | None, batch: int) -> tuple[Any, ...]:
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
    given = getattr(module, "example_input_array", None)  # only a LightningModule has it
    if given is None:
        raise EvaluationError(
            f"{type(module).__name__} has no example_input_array: set it in __init__, or give the shape of one sample "
            "with --shape"
        )
    if isinstance(given, Mapping):
        raise EvaluationError("an example_input_array that is a mapping is not supported: give --shape")
    return tuple(_of_size(each, batch) for each in (given if isinstance(given, tuple) else (given,)))


def _of_size(value: Any, batch: int) -> Any:
    """The first ``batch`` samples of ``value``, repeated if it has fewer."""
    if not isinstance(value, Tensor) or not value.dim():
        return value
    return value.repeat(-(-batch // len(value)), *[1] * (value.dim() - 1))[:batch]


def time_model(quantized: nn.Module, float_model: nn.Module, arguments: tuple[Any, ...], runs: int) -> Timing:
    """Median time of ``forward``, the two models taking turns.

    Args:
        quantized: in eval mode.
        float_model: in eval mode.
        arguments: of ``forward``.
        runs: how often each model runs, after three runs to warm up.

    Raises:
        EvaluationError: ``forward`` does not take such an input.
    """
    return _time_pair(partial(float_model, *arguments), partial(quantized, *arguments), runs)


def _time_pair(float_run: partial[Any], run: partial[Any], runs: int) -> Timing:
    with torch.inference_mode():
        try:
            for _ in range(_WARM_UP):
                float_run()
                run()
        except Exception as error:
            shapes = ", ".join(str(list(each.shape)) for each in run.args if isinstance(each, Tensor))
            name = type(float_run.func).__name__
            raise EvaluationError(f"forward of {name} failed on an input of shape {shapes}: {error}") from error
        return time_in_turns([(float_run, run)], lambda rounds: rounds < runs)


def time_layers(
    quantized: nn.Module, float_model: nn.Module, arguments: tuple[Any, ...], runs: int
) -> dict[str, Timing]:
    """As :func:`time_model` for each layer that was quantized, by its name, on the inputs it gets inside the model.

    A layer that runs several times in one forward pass is timed on its last input.
    """
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    sites = {site.name: site.module for site in find_sites(quantized)}
    floats = {site.name: site.module for site in find_sites(float_model)}
    changed = [name for name, layer in sites.items() if name in floats and type(floats[name]) is not type(layer)]
    handles = [sites[name].register_forward_pre_hook(_note(calls, name), with_kwargs=True) for name in changed]
    with torch.inference_mode():
        quantized(*arguments)
    for handle in handles:
        handle.remove()
    timings = {}
    for name in changed:
        if name in calls:
            args, kwargs = calls[name]
            float_run, run = (partial(layer, *args, **kwargs) for layer in (floats[name], sites[name]))
            timings[name] = _time_pair(float_run, run, runs)
    return timings


def _note(calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[name] = args, kwargs

    return hook
