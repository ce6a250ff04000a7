"""Times a quantized model beside the same model with float layers, on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tinyq_lightning.command.shapes import InputShape, drawn
from tinyq_lightning.errors import EvaluationError
from tinyq_lightning.handover import as_arguments
from tinyq_lightning.plan import find_sites
from tinyq_lightning.search import Timing, time_in_turns

__all__ = [
    "example_input",
    "time_layers",
    "time_model",
]

_WARM_UP = 3


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Those of a call: the positional ones, and those by name."""


def example_input(module: nn.Module, shapes: Sequence[InputShape] | None, batch: int, given: Any = None) -> Arguments:
    """Arguments of ``forward`` for ``batch`` samples.

    Args:
        module: with an ``example_input_array``, unless a shape or an example is given.
        shapes: of one sample of each input, to be drawn at random.
        batch: how many samples. Tensors of the example with as many places in the first dimension as the first tensor
            has are cut or repeated.
        given: an example: a tensor, a tuple of arguments, or a dict of arguments by name.

    Raises:
        EvaluationError: there is none of these.
    """
    if shapes is not None:
        return drawn([replace(each, sizes=(batch, *each.sizes)) for each in shapes]), {}
    given = getattr(module, "example_input_array", None) if given is None else given
    if given is None:
        raise EvaluationError(
            f"{type(module).__name__} has no example_input_array: set it in __init__, give the shape of one sample "
            "with --shape, or a function that returns the arguments of one call with --example"
        )
    tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor) and leaf.dim()]
    rows = len(tensors[0]) if tensors else 0
    sized: Arguments = pytree.tree_map(partial(_of_size, rows=rows, batch=batch), as_arguments(given))
    return sized


def _of_size(value: Any, rows: int, batch: int) -> Any:
    """The first ``batch`` samples of a tensor of so many rows, repeated if it has fewer."""
    if not isinstance(value, Tensor) or not value.dim() or len(value) != rows or not rows:
        return value
    return value.repeat(-(-batch // rows), *[1] * (value.dim() - 1))[:batch]


def time_model(quantized: nn.Module, float_model: nn.Module, arguments: Arguments, runs: int) -> Timing:
    """Median time of ``forward``, the two models taking turns.

    Args:
        quantized: in eval mode.
        float_model: in eval mode.
        arguments: of ``forward``.
        runs: how often each model runs, after three runs to warm up.

    Raises:
        EvaluationError: ``forward`` does not take such an input.
    """
    args, kwargs = arguments
    return _time_pair(partial(float_model, *args, **kwargs), partial(quantized, *args, **kwargs), runs)


def _time_pair(float_run: partial[Any], run: partial[Any], runs: int) -> Timing:
    with torch.inference_mode():
        try:
            for _ in range(_WARM_UP):
                float_run()
                run()
        except Exception as error:
            given = pytree.tree_leaves((run.args, run.keywords))
            shapes = ", ".join(str(list(each.shape)) for each in given if isinstance(each, Tensor))
            name = type(float_run.func).__name__
            raise EvaluationError(f"forward of {name} failed on an input of shape {shapes}: {error}") from error
        return time_in_turns([(float_run, run)], lambda rounds: rounds < runs)


def time_layers(quantized: nn.Module, float_model: nn.Module, arguments: Arguments, runs: int) -> dict[str, Timing]:
    """As :func:`time_model` for each layer that was quantized, by its name, on the inputs it gets inside the model.

    A layer that runs several times in one forward pass is timed on its last input.
    """
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    sites = {site.name: site.module for site in find_sites(quantized)}
    floats = {site.name: site.module for site in find_sites(float_model)}
    changed = [name for name, layer in sites.items() if name in floats and type(floats[name]) is not type(layer)]
    handles = [sites[name].register_forward_pre_hook(_note(calls, name), with_kwargs=True) for name in changed]
    with torch.inference_mode():
        quantized(*arguments[0], **arguments[1])
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
