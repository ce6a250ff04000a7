"""Recurrent layers of a class that is derived from torch's and has a forward or methods of its own.

pytorch-forecasting's LSTM takes the lengths of sequences, others drop parts of their input. Their code runs as it is,
on an object of their own class with float weights, if it reads what the layer holds and writes nothing.
"""

from __future__ import annotations

from functools import lru_cache
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from tinyq_lightning.layers.behaviour import codes, writes
from tinyq_lightning.layers.recurrent import RECURRENT, QuantizedRecurrent
from tinyq_lightning.layers.why_float import why_own_way, why_replaced

__all__ = [
    "quantized_class",
    "torch_class",
    "why_own_code",
]

_PLAIN = (bool, int, float, str, tuple, type(None))


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


def why_own_code(module: nn.Module, base: type[nn.Module]) -> str | None:
    """Why what a subclass has of its own keeps it float; None if it has nothing, or functions that write nothing."""
    why = why_own_way(module, base)
    if why is None or why_replaced(module):
        return why
    kind: Any = parametrize.type_before_parametrizations(module)
    own = [item for each in kind.__mro__[: kind.__mro__.index(base)] for item in vars(each).items()]
    return None if all(_is_taken_over(name, value, base) for name, value in own) else why


def _is_taken_over(name: str, value: Any, base: type[nn.Module]) -> bool:
    """Whether an attribute of a class does on a quantized layer what it does on a float one."""
    if name in ("__call__", "__getattr__", "__getattribute__", "__setattr__"):
        return False
    if name.startswith("__") or name in ("_abc_impl", "_version", "reset_parameters", "extra_repr"):
        return True
    if name != "forward" and hasattr(RECURRENT[base], name):
        return False  # the quantized layer has one of its own
    if isinstance(value, property):
        return value.fset is None and value.fdel is None and _only_reads(value.fget)
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    return isinstance(value, _PLAIN) or _only_reads(value)


def _only_reads(function: Any) -> bool:
    """Whether a function changes nothing that the layer, or anybody else, holds."""
    if not isinstance(function, FunctionType) or writes(function):
        return False
    names = {name for code in codes(function.__code__) for name in code.co_names}
    return not any(name == "data" or (name.endswith("_") and not name.endswith("__")) for name in names)


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
