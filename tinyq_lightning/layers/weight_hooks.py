"""Torch's older hooks that compute a weight before each call: ``weight_norm``, ``spectral_norm`` and pruning."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = [
    "hook_sources",
    "hooked_weight",
    "is_weight_hook",
    "weight_hook",
    "without_weight_hooks",
]

_SOURCES: dict[type, tuple[str, ...]] = {
    WeightNorm: ("_g", "_v"),
    SpectralNorm: ("_orig", "_u", "_v"),
    BasePruningMethod: ("_orig", "_mask"),
}


def weight_hook(module: nn.Module, name: str = "weight") -> Any | None:
    """The hook of torch that computes a weight; None if there is none, or more than one."""
    hooks = [each for each in module._forward_pre_hooks.values() if is_weight_hook(each) and _name(each) == name]
    return hooks[0] if len(hooks) == 1 else None


def is_weight_hook(hook: object) -> bool:
    """Whether a hook is one of those that are known here."""
    return isinstance(hook, tuple(_SOURCES))


def hook_sources(hook: Any) -> tuple[str, ...]:
    """The names of the parameters and buffers that a hook computes its weight from."""
    endings = next(endings for kind, endings in _SOURCES.items() if isinstance(hook, kind))
    return tuple(f"{_name(hook)}{ending}" for ending in endings)


def hooked_weight(module: nn.Module, hook: Any) -> Tensor:
    """The weight that a hook computes in eval mode, which changes no state."""
    with torch.no_grad():
        if isinstance(hook, SpectralNorm):
            return hook.compute_weight(module, do_power_iteration=False)
        if isinstance(hook, WeightNorm):
            return hook.compute_weight(module)  # type: ignore[no-any-return]
        return hook.apply_mask(module)  # type: ignore[no-any-return]


def without_weight_hooks(module: nn.Module) -> dict[int, Any]:
    """The hooks before the forward of a module, without those that compute a weight: the same dict if there is none."""
    hooks = module._forward_pre_hooks
    if not any(map(is_weight_hook, hooks.values())):
        return hooks  # so that a handle the user kept still removes its hook
    return OrderedDict((key, hook) for key, hook in hooks.items() if not is_weight_hook(hook))


def _name(hook: Any) -> str:
    return str(hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name)
