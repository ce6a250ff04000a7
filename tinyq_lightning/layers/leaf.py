"""Quantized layers as leaves of ``torch.fx.symbolic_trace``, as torch's own layers are."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy
from torch.fx.node import map_aggregate

__all__ = [
    "has_proxy",
    "leaf_call",
]


def has_proxy(*arguments: Any) -> bool:
    """Return True if ``torch.fx`` traces the call: one of its arguments stands for a value."""
    return any(isinstance(each, Proxy) for each in arguments)


def leaf_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Record one call of ``module`` in the graph that is being traced.

    A tracer takes a module for a leaf if its class lies in ``torch.nn``, and would otherwise trace its forward, whose
    path depends on the values of the input.
    """
    tracers: list[Any] = []
    map_aggregate((args, kwargs), lambda each: tracers.append(each.tracer) if isinstance(each, Proxy) else None)
    tracer = tracers[0]
    if tracer.root is module:
        raise TypeError(
            f"torch.fx takes a {type(module).__name__} for one call, so there is nothing in it to trace: trace the "
            "module that holds it, or put it in an nn.Sequential"
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)
