"""State dicts of a module and of the same module in wrappers, such as that of ``torch.compile``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn

from tinyq_lightning.plan import users_path

__all__ = [
    "named_as_in",
]


_PARALLEL = "module."


def named_as_in(module: nn.Module, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict by the names of a module, where only wrappers around modules make them differ.

    Args:
        module: which has no wrappers, or others than the one that was saved.
        state_dict: for the module, or of a ``DistributedDataParallel`` around one. It is not changed.
    """
    if state_dict and all(name.startswith(_PARALLEL) for name in state_dict) and "module" not in module._modules:
        state_dict = OrderedDict((name.removeprefix(_PARALLEL), value) for name, value in state_dict.items())
    paths = [*(path for path, _ in module.named_modules(remove_duplicate=False)), *state_dict]
    if all(users_path(path) == path for path in paths):
        return state_dict  # without the module's own state dict, for which codes of four bits would be packed
    own = module.state_dict(keep_vars=True)
    names = {users_path(name): name for name in own}
    if own.keys() == state_dict.keys() or names.keys() != {users_path(name) for name in state_dict}:
        return state_dict
    renamed = OrderedDict((names[users_path(name)], value) for name, value in state_dict.items())
    vars(renamed)["_metadata"] = own._metadata  # type: ignore[attr-defined]
    return renamed
