"""Recurrent layers of a class that is derived from torch's and has a forward or methods of its own.

pytorch-forecasting's LSTM takes the lengths of sequences, others drop parts of their input. Their code runs as it is,
on an object of their own class with float weights, if it reads what the layer holds and writes nothing.
"""

from __future__ import annotations

import dis
from abc import ABCMeta
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from tinyq_lightning.layers.behaviour import code_writes, codes
from tinyq_lightning.layers.recurrent import RECURRENT, QuantizedRecurrent
from tinyq_lightning.layers.why_float import why_own_way, why_replaced

__all__ = [
    "quantized_class",
    "torch_class",
    "why_own_code",
]

_PLAIN = (bool, int, float, str, tuple, type(None))


# What a class body has of its own accord, and what makes and shows a layer.
_MADE = {"__module__", "__doc__", "__init__", "__annotations__", "__qualname__", "__dict__", "__weakref__", "__slots__"}
_MADE |= {"__abstractmethods__", "__orig_bases__", "__parameters__", "__constants__", "__repr__", "__firstlineno__"}
_MADE |= {"__static_attributes__", "__annotate__", "__annotate_func__", "_abc_impl", "_version", "reset_parameters"}
_MADE |= {"extra_repr"}


# By these a function finds weights that a quantized layer does not hold as parameters, or what only torch's code knows.
_FINDS = {"parameters", "named_parameters", "get_parameter", "state_dict", "apply", "vars", "getattr", "_parameters"}
_FINDS |= {"_flat_weights_names", "_flat_weight_refs", "_buffers", "buffers", "named_buffers", "data"}


def torch_class(module: nn.Module) -> type[nn.Module]:
    """The class of torch that a recurrent layer is of."""
    return next(each for each in RECURRENT if isinstance(module, each))


def quantized_class(module: nn.Module) -> type[QuantizedRecurrent]:
    """The class of the quantized layer of a float one; derived from that one's class, if it has own code."""
    base = torch_class(module)
    quantized: Any = RECURRENT[base]
    if why_own_way(module, base) is None:
        return quantized  # type: ignore[no-any-return]
    return _derived(quantized, parametrize.type_before_parametrizations(module))  # type: ignore[no-any-return]


def why_own_code(module: nn.Module, base: Any) -> str | None:
    """Why what a subclass has of its own keeps it float; None if it has nothing, or functions that write nothing."""
    why = why_own_way(module, base)
    if why is None or why_replaced(module):
        return why
    kind: Any = parametrize.type_before_parametrizations(module)
    if type(kind) not in (type, ABCMeta):
        return why
    classes: list[Any] = [each for each in kind.__mro__ if each not in base.__mro__]
    own = [(name, value) for each in classes for name, value in vars(each).items()]
    names = {*vars(module), *(name for name, _ in own if not name.startswith("__"))}
    taken_over = names.isdisjoint(_held_by_quantized(base)) and all(
        _is_taken_over(name, value, base) for name, value in own
    )
    return None if taken_over else why


@lru_cache(maxsize=16)
def _held_by_quantized(base: Any) -> frozenset[str]:
    """The attributes of a quantized layer's own, which would be read in the place of a float one's."""
    like = base(1, 1)
    made = RECURRENT[base](like)
    return frozenset({*vars(made), *dir(made)} - {*vars(like), *dir(base)})


def _is_taken_over(name: str, value: Any, base: Any) -> bool:
    """Whether an attribute of a class does on a quantized layer what it does on a float one."""
    if name in _MADE:
        return True
    if name.startswith("__"):
        return False
    if name != "forward" and hasattr(RECURRENT[base], name):
        return False  # the quantized layer has one of its own
    if isinstance(value, property):
        return value.fset is None and value.fdel is None and _only_reads(value.fget)
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    return isinstance(value, _PLAIN) or _only_reads(value)


def _only_reads(function: Any) -> bool:
    """Whether a function, and what is wrapped in it, changes nothing that the layer, or anybody else, holds."""
    while function is not None:
        if not isinstance(function, FunctionType) or any(map(_may_write, codes(function.__code__))):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def _may_write(code: CodeType) -> bool:
    if code_writes(code) or not _FINDS.isdisjoint(code.co_names):
        return True
    # `w *= 2` writes to what `w` names
    in_place = (
        "INPLACE_" in each.opname or (each.opname == "BINARY_OP" and each.argrepr.endswith("="))
        for each in dis.get_instructions(code)
    )
    return any(in_place) or any(name.endswith("_") and not name.endswith("__") for name in code.co_names)


@lru_cache(maxsize=256)
def _derived(quantized: Any, kind: Any) -> Any:
    """A subclass of a quantized class and of a class of the user's."""
    content = {
        "torch_class": kind,
        "forward_is_own": kind.forward is not quantized.torch_class.forward,
        "__reduce_ex__": _reduce,
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
    }
    return type(f"Quantized{kind.__name__}", (quantized, kind), content)


def _reduce(self: Any, protocol: Any) -> Any:
    """For pickles and copies, which know a class by its name: how it is made from those that it is derived from."""
    kind = type(self)
    quantized = next(each for each in RECURRENT.values() if issubclass(kind, each))
    return _empty, (quantized, kind.__bases__[-1]), self.__getstate__()


def _empty(quantized: Any, kind: Any) -> Any:
    return object.__new__(_derived(quantized, kind))
