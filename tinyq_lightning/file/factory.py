"""What makes the module that a file is loaded into: a class or a function, of Lightning or of plain PyTorch."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

from torch import nn

from tinyq_lightning.errors import ModelError
from tinyq_lightning.file.trust import import_named
from tinyq_lightning.namespaces import derives_from, is_overridden

__all__ = [
    "as_factory",
    "is_lightning_class",
    "made_by",
    "name_of",
    "overrides",
    "parameters_of",
]

Module = TypeVar("Module", bound=nn.Module)


def as_factory(given: Any) -> Any:
    """The class or function that makes a module.

    Args:
        given: it, or where to import it: ``package.module:name``.

    Raises:
        ModelError: it makes no modules.
    """
    if isinstance(given, str):
        if os.path.exists(given):
            raise ModelError(
                f"{given!r} is a file, not a class: the path comes first, as in load_quantized({given!r}, Net)"
            )
        found, given = given, import_named(given)
        if not callable(given) or isinstance(given, nn.Module):
            raise ModelError(f"{found!r} is neither a class nor a function: give what makes the module")
    if isinstance(given, nn.Module):
        name = type(given).__name__
        raise ModelError(
            f"load_quantized takes the class, or a function that makes the module, and not a module: give {name} "
            f"instead of {name}(...), and its arguments by name, as in load_quantized(path, {name}, argument=...)"
        )
    if isinstance(given, type) and not issubclass(given, nn.Module):
        raise ModelError(f"a class of modules is needed, and {given.__name__} is no nn.Module")
    if not callable(given):
        raise ModelError(f"load_quantized takes a class or a function that makes the module, not a {_kind(given)}")
    return given


def _kind(value: Any) -> str:
    return type(value).__name__


def made_by(factory: Callable[..., Module], arguments: dict[str, Any]) -> Module:
    """The module that a class or a function makes.

    Raises:
        ModelError: it is no module.
    """
    module = factory(**arguments)
    if not isinstance(module, nn.Module):
        raise ModelError(f"{name_of(factory)} returned a {_kind(module)}, not an nn.Module")
    return module


def name_of(factory: Any) -> str:
    """The name of a class or a function, for messages."""
    if isinstance(factory, functools.partial):
        return name_of(factory.func)
    return str(getattr(factory, "__name__", _kind(factory)))


def parameters_of(factory: Any) -> dict[str, inspect.Parameter]:
    """The parameters that a class or a function takes; none if it does not tell."""
    if isinstance(factory, type):
        return dict(list(inspect.signature(factory.__init__).parameters.items())[1:])  # type: ignore[misc]
    try:
        return dict(inspect.signature(factory).parameters)
    except (TypeError, ValueError):  # it is written in C
        return {}


def is_lightning_class(factory: Any) -> TypeGuard[type]:
    """Whether this is a LightningModule class, of either package. Lightning is not imported."""
    return isinstance(factory, type) and derives_from(factory, "LightningModule")


def overrides(module: nn.Module, hook: str) -> bool:
    """Whether a LightningModule has a hook of its own."""
    return is_lightning_class(type(module)) and is_overridden(hook, module)
