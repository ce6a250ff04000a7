"""A sharded module as it would be unsharded: the same structure, with its weights on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from tinyq_lightning.errors import TrainerError, quoted
from tinyq_lightning.plan import unwrapped

__all__ = [
    "unsharded_twin",
    "whole_class",
]

Module = TypeVar("Module", bound=nn.Module)

# What torch's parallelism leaves in the attributes of a module.
_MARKS = ("__composable_api_state_key_", "_is_fsdp_managed_module", "_fsdp_use_orig_params", "_distribute_module_")

_HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")

_KEPT = ("_trainer", "_device_mesh", "_fabric")
"""Attributes of a LightningModule that a copy of it refers to."""


def unsharded_twin(module: Module) -> Module:
    """A copy without what parallelism made of the module, whose weights have no memory.

    Without the classes and hooks of FSDP2 and tensor parallelism, and without the wrappers of ``torch.compile`` and of
    activation checkpointing, whose names torch leaves out of distributed checkpoints too.

    Parameters and saved buffers are on the meta device, in their whole shapes; other buffers are those of ``module``.
    No process talks to another for this.

    Args:
        module: sharded, in part or as a whole. It is as before afterwards.

    Raises:
        TrainerError: the module cannot be copied.
    """
    memo: dict[int, object] = {}
    saved = {id(value) for value in module.state_dict(keep_vars=True).values() if isinstance(value, Tensor)}
    for parameter in module.parameters():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(whole, parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta") if id(buffer) in saved else buffer
    for name in _KEPT:
        if (value := vars(module).get(name)) is not None:
            memo[id(value)] = value
    with _without_parallelism(module):
        try:
            return copy.deepcopy(module, memo)
        except Exception as error:  # what hangs on the module may refuse in its own way
            raise TrainerError(
                f"{type(module).__name__} is sharded and cannot be copied without its weights, which quantizing it "
                f"here begins with: {quoted(error)}. Train without TinyQCallback, then run "
                "tinyq-lightning quantize CHECKPOINT --model package.module:Class"
            ) from error


def whole_class(module: nn.Module) -> type:
    """The class of a module before FSDP2 put its own in front: Linear of FSDPLinear."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


@contextmanager
def _without_parallelism(module: nn.Module) -> Iterator[None]:
    """Classes and attributes of all modules as before torch's parallelism changed them, inside the block."""
    before = [(each, type(each), dict(vars(each))) for each in module.modules()]
    try:
        for each, _, attributes in before:
            each.__class__ = whole_class(each)
            own = {name: value for name, value in attributes.items() if not name.startswith(_MARKS)}
            hooks = {name: value for name, value in own.items() if name.endswith(_HOOKS) and isinstance(value, dict)}
            torchs = {key for value in hooks.values() for key, hook in value.items() if _is_torchs(hook)}
            for name, value in hooks.items():
                own[name] = type(value)((key, hook) for key, hook in value.items() if key not in torchs)
            own["_modules"] = {name: unwrapped(child) for name, child in each._modules.items()}
            _set_attributes(each, own)
        yield
    finally:
        for each, kind, attributes in before:
            each.__class__ = kind
            _set_attributes(each, attributes)


def _set_attributes(module: nn.Module, attributes: dict[str, object]) -> None:
    vars(module).clear()
    vars(module).update(attributes)


def _is_torchs(hook: object) -> bool:
    """Whether a hook is one of torch's parallelism."""
    function = getattr(hook, "hook", hook)
    return callable(function) and (getattr(function, "__module__", None) or "").startswith("torch.distributed")
