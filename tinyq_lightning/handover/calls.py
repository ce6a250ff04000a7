"""The inputs that a module is called with while the user's own code runs it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tinyq_lightning.errors import ExportError
from tinyq_lightning.handover.example import copies_on_cpu, named_arguments

__all__ = [
    "recorded_calls",
]


@contextmanager
def recorded_calls(module: nn.Module, method: str = "forward") -> Iterator[list[Any]]:
    """Context manager in which the inputs of each call of a method are noted.

    Args:
        module: the module; it computes what it does without.
        method: name of the method.

    Returns:
        A list that grows with each call: of inputs as :func:`~tinyq_lightning.export` takes them, on the CPU: a tuple
        of arguments, or a dict by name if some were given by name.
    """
    own, calls = getattr(module, method), list[Any]()

    @functools.wraps(own)
    def noting(*args: Any, **kwargs: Any) -> Any:
        args_here, kwargs_here = copies_on_cpu((args, kwargs))
        calls.append(_by_name(own, args_here, kwargs_here) if kwargs else args_here)
        return own(*args, **kwargs)

    former = vars(module).get(method)
    vars(module)[method] = noting
    try:
        yield calls
    finally:
        del vars(module)[method]
        if former is not None:
            vars(module)[method] = former


def _by_name(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(own)
    given = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL and given.get(name):
            raise ExportError(
                f"a call gives *{name} and arguments by name ({', '.join(kwargs)}) at once, which cannot be noted: "
                "give the inputs yourself"
            )
    return named_arguments(own, args, kwargs)
