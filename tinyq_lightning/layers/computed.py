"""The weight that a float layer uses, which may be computed on each call: by a parametrization, a hook, its forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

from tinyq_lightning.layers.own_forward import computed_weight, own_forward
from tinyq_lightning.layers.weight_hooks import hook_sources, hooked_weight, weight_hook

__all__ = [
    "float_weight",
    "sources_of",
    "take_weight",
    "why_fixed",
]

_NEAR = 0.02  # of the largest weight: a standardized weight that was rounded is standardized to nearly the same


def float_weight(module: nn.Module, name: str = "weight") -> Tensor:
    """A weight that a float layer uses. One that is computed is computed in eval mode, which changes no state."""
    if parametrize.is_parametrized(module, name):
        return _parametrized(module, name)
    if (hook := _hook(module, name)) is not None:
        return hooked_weight(module, hook)
    if name == "weight" and sources_of(module):
        return computed_weight(module)
    return getattr(module, name)  # type: ignore[no-any-return]


def sources_of(module: nn.Module, name: str = "weight") -> tuple[str, ...]:
    """The parameters and buffers of a layer that it computes a weight from, by a hook or in its forward.

    Returns:
        None of them if the weight is a parameter, or parametrized.
    """
    if parametrize.is_parametrized(module, name):
        return ()
    if (hook := _hook(module, name)) is not None:
        return hook_sources(hook)
    found = own_forward(module) if name == "weight" else None
    return () if found is None else found.sources


def take_weight(module: nn.Module, values: Tensor, name: str = "weight") -> bool:
    """Have a layer that computes a weight compute these values.

    Returns:
        False if they cannot be told from what it computes them from; the layer is then as it was.
    """
    sources = [getattr(module, each) for each in sources_of(module, name)]
    before = [each.detach().clone() for each in sources]
    with torch.no_grad():
        for each in sources:
            if each.shape == values.shape and isinstance(each, nn.Parameter):
                each.data.copy_(values)
        if isinstance(hook := _hook(module, name), WeightNorm):
            getattr(module, f"{name}_g").data.copy_(torch.norm_except_dim(values, 2, hook.dim))
        if torch.allclose(float_weight(module, name), values, rtol=0, atol=_NEAR * float(values.abs().max())):
            return True
        for each, value in zip(sources, before, strict=True):
            each.data.copy_(value)
    return False


def why_fixed(module: nn.Module, name: str = "weight") -> str | None:
    """What computes a weight that is fixed once it is quantized, for the plan; None if nothing does."""
    sources = sources_of(module, name)
    if not sources:
        return None
    hook = _hook(module, name)
    by = type(module if hook is None else hook).__name__
    return f"its {name} is fixed as {by} computes it from {', '.join(sources)}"


def _hook(module: nn.Module, name: str) -> object | None:
    return None if name in module._parameters else weight_hook(module, name)


def _parametrized(module: nn.Module, name: str) -> Tensor:
    below = list(module.parametrizations.modules())  # type: ignore[union-attr]
    modes = [each.training for each in below]
    try:
        for each in below:
            each.training = False  # in training mode, spectral_norm would make a step of its power iteration
        with torch.no_grad():
            return getattr(module, name)  # type: ignore[no-any-return]
    finally:
        for each, mode in zip(below, modes, strict=True):
            each.training = mode
