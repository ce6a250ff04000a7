"""Builds a module from what a checkpoint holds of it."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, TypeVar, cast

from torch import nn

from tinyq_lightning.errors import CheckpointError, ModelError
from tinyq_lightning.file.arguments import Arguments
from tinyq_lightning.file.factory import is_lightning_class, made_by, overrides
from tinyq_lightning.file.trust import from_config, import_class, refuse_other_class
from tinyq_lightning.namespaces import namespace_of

__all__ = [
    "build",
]

_UNKNOWN = object()
Module = TypeVar("Module", bound=nn.Module)


def build(
    module_class: Callable[..., Module],
    content: Mapping[str, Any],
    init_args: Mapping[str, Any],
    trust: bool = False,
    source: str = "the checkpoint",
) -> Module:
    """An instance from the stored hyper-parameters, by the rules of Lightning's ``load_from_checkpoint``.

    Args:
        module_class: the class, of Lightning or not, or a function that makes the module.
        content: of a checkpoint, float or quantized.
        init_args: arguments that replace the stored ones; ``block.cls`` is one entry of a stored argument.
        trust: import and call what the file names: the objects that LightningCLI stored as ``class_path``, a
            subclass of ``module_class``, resolvers of OmegaConf.
        source: the file's name, for errors.

    Raises:
        TypeError: the arguments are not those of the class.
        ModelError: what was made is no module.
        CheckpointError: the file names another class or something to import and is not trusted, or it could not
            hold an argument that is not given.
    """
    stored = Arguments(module_class, content, init_args, trust, source)
    arguments = stored.for_call()
    if stored.from_cli and not is_lightning_class(module_class):
        arguments.pop("_class_path", None)  # of the LightningModule that the file was made from
    if stored.from_cli and trust and isinstance(module_class, type):
        module = cast("Module", _by_lightning_cli(module_class, arguments, source))
    else:
        class_path = arguments.pop("_class_path", None)
        if stored.from_cli:
            refuse_other_class(class_path, module_class, source)
            arguments = from_config(arguments, init_args, _annotations(module_class), module_class, source)
        module = made_by(module_class, arguments)
    if overrides(module, "configure_model"):
        _configure(module)
    return module


def _configure(module: Any) -> None:
    """Call ``configure_model``, which may only end where it asks for the mesh of processes that a strategy makes.

    Layers that it has not made by then are missed later on: in the plan, or when the weights are loaded.
    """
    try:
        module.configure_model()
    except Exception:
        function = inspect.unwrap(type(module).configure_model)
        if module.device_mesh is not None or "device_mesh" not in function.__code__.co_names:
            raise


def _by_lightning_cli(module_class: type, arguments: Mapping[str, Any], source: str) -> nn.Module:
    class_path = arguments.get("_class_path")
    if class_path is not None:
        try:
            import_class(str(class_path), module_class)
        except ModelError as error:
            raise CheckpointError(f"{source}: {error}") from error
    module: nn.Module = namespace_of(module_class).module("cli").instantiate_module(module_class, dict(arguments))
    return module


def _annotations(module_class: Any) -> dict[str, Any]:
    """Of all parameters that ``__init__`` takes, also through ``**kwargs`` by those of the base classes."""
    found: dict[str, Any] = {}
    is_class = isinstance(module_class, type)
    inits = [vars(cls).get("__init__") for cls in reversed(module_class.__mro__)] if is_class else [module_class]
    for init in inits:
        if init is not None:
            for name, annotation in getattr(init, "__annotations__", {}).items():
                found[name] = _UNKNOWN
                with suppress(Exception):  # it has a name that cannot be resolved
                    one = SimpleNamespace(__annotations__={name: annotation})
                    found[name] = typing.get_type_hints(one, globalns=getattr(init, "__globals__", {}))[name]
    return found
