"""Why a layer stays float: what a subclass adds, what its weight is, what was attached to it."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from tinyq_lightning.layers.behaviour import (
    computes_linear,
    computes_scaled_embedding,
    forward_takes_one_input,
)
from tinyq_lightning.layers.computed import sources_of
from tinyq_lightning.layers.own_forward import OWN_FUNCTIONS, own_forward
from tinyq_lightning.layers.own_values import holds_for

__all__ = [
    "is_torchs",
    "static_functions",
    "why_holds_more",
    "why_more_than",
    "why_more_than_forward",
    "why_own_way",
    "why_replaced",
    "why_weight",
]

# What a subclass may define and still be replaced: how it is made and shown, not what it does.
_HARMLESS = {"reset_parameters", "extra_repr", "_version"}


# The same of a class that is no nn.Linear: its product is tried, and lazy classes give themselves a shape.
_HARMLESS_IF_NO_LINEAR = {"forward", "initialize_parameters"}


_TELLING = {"__call__", "__getattr__", "__getattribute__", "__setattr__"}


# Hooks around the state dict. They are about the float layer's entries, so they do not go over to a quantized one.
_STATE_HOOKS = {
    "_state_dict_hooks": "a state_dict hook",
    "_state_dict_pre_hooks": "a state_dict pre-hook",
    "_load_state_dict_pre_hooks": "a hook of load_state_dict",
    "_load_state_dict_post_hooks": "a hook of load_state_dict",
}


def is_torchs(module: nn.Module, base: Any) -> bool:
    """Whether the forward of ``module`` is that of torch's class."""
    kind: Any = parametrize.type_before_parametrizations(module)
    return kind.forward is base.forward


def why_replaced(module: nn.Module) -> str | None:
    """Why a module whose forward was set on the instance stays float; None if it was not."""
    return "its forward was replaced" if "forward" in vars(module) else None


def why_own_way(module: nn.Module, base: Any, forward: bool = False) -> str | None:
    """Why a module is more than its torch class, whose behaviour is known; None if it is not.

    Args:
        module: of a subclass.
        base: torch's class.
        forward: whether a forward of its own is known to compute the same.
    """
    kind: Any = parametrize.type_before_parametrizations(module)
    if not forward and kind.forward is not base.forward:
        return f"{kind.__name__} has a forward of its own"
    if why := why_replaced(module):
        return why
    own = {name for each in kind.__mro__ if each not in base.__mro__ for name in vars(each)}
    own = {name for name in own - _HARMLESS if not name.startswith("__") or name in _TELLING}
    own -= set(OWN_FUNCTIONS) if forward else set()
    own -= static_functions(module).keys()
    return f"{kind.__name__} adds {', '.join(sorted(own))} to nn.{base.__name__}" if own else None


def static_functions(module: nn.Module) -> dict[str, Any]:
    """The static methods that a subclass adds to torch's class: they cannot change what a layer does.

    Without those that a pickle cannot name.
    """
    kind: Any = parametrize.type_before_parametrizations(module)
    base = next(each for each in kind.__mro__ if each.__module__.partition(".")[0] == "torch")
    own = {name for each in kind.__mro__[: kind.__mro__.index(base)] for name in vars(each) if not hasattr(base, name)}
    static = {name for name in own if isinstance(inspect.getattr_static(kind, name), staticmethod)}
    added = {name: getattr(kind, name) for name in sorted(static) if not name.startswith("__")}
    return {name: each for name, each in added.items() if "<lambda>" not in getattr(each, "__qualname__", "<lambda>")}


def why_more_than_forward(module: nn.Module) -> str | None:
    """Why a class that is no ``nn.Linear`` has more to it than its forward; None if it has not."""
    kind = type(module)
    own = {name for each in kind.__mro__[: kind.__mro__.index(nn.Module)] for name in vars(each)}
    own = {name for name in own - _HARMLESS - _HARMLESS_IF_NO_LINEAR if name in _TELLING or not name.startswith("__")}
    own = {name for name in own if not name.startswith("_") or hasattr(nn.Module, name)}
    if "_save_to_state_dict" in own:
        saved: dict[str, Any] = {}
        module._save_to_state_dict(saved, "", False)
        own -= {"_save_to_state_dict"} if saved.keys() <= {"weight", "bias"} else set()
    if "_load_from_state_dict" in own and _loads_as_it_is(module):
        own -= {"_load_from_state_dict"}
    return f"{kind.__name__} adds {', '.join(sorted(own))} to what nn.Linear has" if own else None


def _loads_as_it_is(module: nn.Module) -> bool:
    """Whether a module takes weight and bias out of a state dict as they are: tried on a small one of its class."""
    twin = object.__new__(type(module))
    nn.Module.__init__(twin)
    plain = {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str)}
    vars(twin).update(plain)
    shapes = {"weight": (3, 2), "bias": (3,)}
    names = [name for name, value in module._parameters.items() if value is not None]
    state = {name: torch.ones(shapes[name]) for name in names}
    for name in module._parameters:
        twin.register_parameter(name, nn.Parameter(torch.zeros(shapes[name])) if name in names else None)
    try:
        told = twin.load_state_dict(state, strict=False)
    except Exception:  # whatever its own way may raise
        return False
    loaded = all(torch.equal(twin.get_parameter(name), state[name]) for name in names)
    return loaded and not told.missing_keys and not told.unexpected_keys


def why_more_than(module: nn.Module, base: Any) -> str | None:
    """As :func:`why_own_way`; a forward of its own is tried, and taken for torch's if it computes the same."""
    if isinstance(module._parameters.get("weight"), UninitializedParameter):
        return None  # an error, unless it is left float
    why = why_own_way(module, base)
    if why is None or parametrize.is_parametrized(module) or why_replaced(module):
        return why
    return why_own_way(module, base, forward=True) if _is_known(module, base) else why


def _is_known(module: nn.Module, base: Any) -> bool:
    """Whether what the forward of a subclass computes is known."""
    weight = module._parameters.get("weight")
    flat = weight is not None and weight.dim() == 2 and weight.is_floating_point()
    if flat and not is_torchs(module, base) and forward_takes_one_input(module):
        if base is nn.Embedding:
            return computes_scaled_embedding(module) is not None
        if computes_linear(module) and holds_for(module, None, computes=False):
            return True
    return own_forward(module) is not None


def why_weight(module: nn.Module, name: str = "weight", hooks: bool = True) -> str | None:
    """Why a weight cannot be replaced by codes; None if it can.

    Args:
        module: the layer.
        name: of the weight.
        hooks: whether one that a hook of torch computes can be.
    """
    weight = module._parameters.get(name)
    if isinstance(weight, UninitializedParameter) or parametrize.is_parametrized(module, name):
        return None
    if weight is None and hooks and sources_of(module, name):
        return None
    if weight is None:
        before = module._forward_pre_hooks.values()
        named = [hook for hook in before if name in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None))]
        return "its weight is computed by " + (f"the hook {type(named[0]).__name__}" if named else "a hook")
    for what, tensor in ((name, weight), ("bias", module._parameters.get("bias"))):
        if tensor is not None and type(tensor) is not nn.Parameter:
            if not isinstance(tensor, UninitializedParameter):
                return f"its {what} has the type {type(tensor).__name__}"
        elif tensor is not None and tensor.layout != torch.strided:
            return f"its {what} is {str(tensor.layout).removeprefix('torch.')}"
    if not weight.is_floating_point():
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    return None if weight.numel() else f"its weight is empty: {list(weight.shape)}"


def why_holds_more(module: nn.Module, known: Collection[str] = ("weight", "bias")) -> str | None:
    """Why what was attached to a layer keeps it float; None if nothing was that a quantized layer would not have.

    Args:
        module: the layer.
        known: the parameters that a layer of its kind has.
    """
    known = {*known, *sources_of(module)}
    modules = module._modules if own_forward(module) is None else {}  # they are in what it computes
    held: dict[str, Any] = {**module._parameters, **modules}
    scaled = isinstance(module, nn.Embedding) and not is_torchs(module, nn.Embedding)
    # The factor of a scaled embedding is carried over as a number, so a file must not hold another.
    kept = module._non_persistent_buffers_set if scaled else set()
    held |= {name: buffer for name, buffer in module._buffers.items() if name not in kept}
    for name in list(held.get("parametrizations") or ()) if parametrize.is_parametrized(module) else ():
        held.pop(str(name), None)
        if str(name) in known:
            held.pop("parametrizations", None)
    if more := sorted(held.keys() - known):
        return f"it holds {', '.join(more)} besides its weight"
    own = next((what for key, what in _STATE_HOOKS.items() if _of_others(module, vars(module).get(key))), None)
    return f"it has {own}" if own else None


def _of_others(module: nn.Module, hooks: Any) -> bool:
    """Whether there is a hook that is neither torch's own nor a method of the module itself."""
    for held in (hooks or {}).values():
        hook = getattr(held, "hook", held)  # torch wraps some of them
        torchs = str(getattr(hook, "__module__", "")).partition(".")[0] == "torch"
        if not torchs and getattr(hook, "__self__", None) is not module:
            return True
    return False
