"""The weight that a float layer uses, parametrized or not."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = [
    "float_weight",
]


def float_weight(module: nn.Module, name: str = "weight") -> Tensor:
    """A weight that a float layer uses. A parametrized one is computed in eval mode, which changes no state."""
    if not parametrize.is_parametrized(module, name):
        return getattr(module, name)  # type: ignore[no-any-return]
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
