"""Modules that torch puts around a user's module: no level of the names that users know."""

from __future__ import annotations

from torch import nn

__all__ = [
    "WRAPPERS",
    "unwrapped",
    "users_path",
]

WRAPPERS = frozenset(("_orig_mod", "_checkpoint_wrapped_module"))
"""The attributes by which they hold it: of ``torch.compile``, and of activation checkpointing."""


def users_path(path: str) -> str:
    """A dotted path without the levels that wrappers add: ``net.0.weight`` for ``net.0._orig_mod.weight``."""
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def unwrapped(module: nn.Module | None) -> nn.Module | None:
    """The module in a wrapper, or in several; any other as it is."""
    while module is not None and (inner := WRAPPERS & module._modules.keys()):
        module = module._modules[min(inner)]
    return module
