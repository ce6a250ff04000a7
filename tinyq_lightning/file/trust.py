"""What a file may name without being trusted: nothing that would have to be imported or called."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from tinyq_lightning.errors import CheckpointError, ModelError
from tinyq_lightning.namespaces import derives_from

__all__ = [
    "call_with",
    "from_config",
    "import_class",
    "import_lightning_class",
    "import_named",
    "refuse_other_class",
]

Kind = TypeVar("Kind")

_CONTAINERS = (list, tuple, set, frozenset, dict, Sequence, Iterable, Mapping)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), Path, os.PathLike)


def import_class(path: str, base: type[Kind]) -> type[Kind]:
    """The class at ``package.module:Class``; ``package.module.Class`` does as well.

    Raises:
        ModelError: there is none, or it is not a ``base``.
    """
    found = import_named(path)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ModelError(f"{path!r} is not a {base.__name__}")
    return found


def import_lightning_class(path: str, name: str) -> Any:
    """As :func:`import_class`, of a class that derives from Lightning's class ``name``, of either package."""
    found = import_named(path)
    if not (isinstance(found, type) and derives_from(found, name)):
        raise ModelError(f"{path!r} is not a {name}")
    return found


def import_named(path: str) -> Any:
    """What is at ``package.module:name``; ``package.module.name`` does as well.

    Raises:
        ModelError: there is none.
    """
    module_name, colon, name = path.partition(":")
    tries = [(module_name, name)] if colon else list(_splits(path))
    failure: Exception = ImportError("it names no module")
    for module_name, name in tries:
        try:
            found: Any = importlib.import_module(module_name)
            for part in name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError, ValueError) as error:
            failure = error
            continue
        return found
    raise ModelError(f"{path!r} cannot be imported: {failure}. Write it as package.module:Class") from failure


def _splits(path: str) -> Iterator[tuple[str, str]]:
    """Module and name for ``a.b.C``, and for a nested class: ``a.b``, ``C`` and ``a``, ``b.C``."""
    parts = path.split(".")
    return ((".".join(parts[:i]), ".".join(parts[i:])) for i in range(1, len(parts)))


def call_with(module_class: Any, name: str) -> str:
    """The call that gives an argument by hand, for error messages."""
    argument = f"{name}=..." if name.isidentifier() else f"**{{{name!r}: ...}}"
    return f"load_quantized(path, {getattr(module_class, '__name__', 'Net')}, {argument})"


def refuse_other_class(class_path: Any, module_class: Any, source: str) -> None:
    """A file does not decide what is called: the class it names must be the given one.

    Raises:
        CheckpointError: it is another.
    """
    if class_path is None:
        return
    path, own = str(class_path), module_class.__qualname__
    module_name, _, name = path.rpartition(".")
    module = sys.modules.get(module_name)
    # not getattr, because the __getattr__ of a module can import what the file names
    found = vars(module).get(name) if isinstance(module, types.ModuleType) else None
    in_script = module_class.__module__ == "__main__" and path.endswith(f".{own}")
    if (
        found is not module_class
        and path not in (f"{module_class.__module__}.{own}", f"__main__.{own}")
        and not in_script
    ):
        raise CheckpointError(
            f"{source}: the checkpoint was made from {class_path}, and {module_class.__name__} was given: give that "
            "class, or pass trust=True (--trust on the command line) to let the file name it"
        )


def from_config(
    arguments: Mapping[str, Any], given: Iterable[str], annotations: Mapping[str, Any], module_class: Any, source: str
) -> dict[str, Any]:
    """The arguments that LightningCLI stored, as values of the annotated types, without importing anything.

    LightningCLI stores an object as ``class_path`` and ``init_args``, and an Enum, a path or a tuple as YAML has it.

    Args:
        arguments: of the class.
        given: those that are not from the file.
        annotations: of the parameters.
        module_class: the class, for the error.
        source: the file's name, for the error.

    Raises:
        CheckpointError: an argument needs an import.
    """
    taken = set(given)
    values: dict[str, Any] = {}
    wanted: dict[str, str] = {}
    for name, value in arguments.items():
        annotation = annotations.get(name, Any)
        paths = sorted(set(_class_paths(value)))
        loose = sorted(set(_loose_texts(annotation, value)))
        if name in taken:
            values[name] = value
        elif paths:
            wanted[name] = ", ".join(paths)
        elif _is_plain(annotation, ()) and not loose:
            values[name] = _parsed(annotation, value)
        elif isinstance(value, str) and not _takes_text(annotation):
            wanted[name] = value
        elif _is_plain(annotation, ()) and not isinstance(value, str):
            wanted[name] = ", ".join(loose)
        else:
            values[name] = value
    if wanted:
        asked = "; ".join(f"{name}: {paths}" for name, paths in wanted.items())
        raise CheckpointError(
            f"{source}: the file asks to import and call what it names ({asked}). Pass trust=True (--trust on the "
            f"command line) if you trust who made it, or give the argument, as in "
            f"{call_with(module_class, next(iter(wanted)))}"
        )
    return values


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        if "class_path" in value:
            yield str(value["class_path"])
        for item in value.values():
            yield from _class_paths(item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _class_paths(item)


def _loose_texts(annotation: Any, value: Any) -> Iterator[str]:
    """The texts in a value that jsonargparse would read as YAML or as the name of a file, not as the text they are.

    It does so where the type is a dataclass or a mapping, and instantiates the ``class_path`` it finds there.
    """
    if not _reads_text(annotation) or value is None or isinstance(value, bool | int | float):
        return
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    pairs: list[tuple[Any, Any]]
    if origin is typing.Annotated:
        pairs = [(inner[0], value)]
    elif origin in (typing.Union, types.UnionType):
        pairs = [(each, value) for each in inner]
    elif dataclasses.is_dataclass(annotation) and isinstance(value, Mapping):
        hints = typing.get_type_hints(annotation)
        pairs = [(hints.get(key, dict), item) for key, item in value.items()]
    elif inner and issubclass(origin, Mapping) and isinstance(value, Mapping):
        pairs = [pair for key, item in value.items() for pair in ((inner[0], key), (inner[1], item))]
    elif inner and not issubclass(origin, Mapping) and isinstance(value, list | tuple | set | frozenset):
        pairs = [(each, item) for item in value for each in inner if each is not ...]
    elif isinstance(value, list | tuple | set | frozenset):  # of another type of a union
        pairs = [(dict, item) for item in value]
    else:
        yield str(value)
        return
    for each, item in pairs:
        yield from _loose_texts(each, item)


def _reads_text(annotation: Any) -> bool:
    """True if jsonargparse may read text of the annotated type as YAML or as the name of a file."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return False
    if origin is typing.Annotated:
        return _reads_text(inner[0])
    if origin in _CONTAINERS and (not inner or issubclass(origin, Mapping)):
        return True
    return annotation is dict or dataclasses.is_dataclass(annotation) or any(map(_reads_text, inner))


def _parsed(annotation: Any, value: Any) -> Any:
    """As jsonargparse, which LightningCLI uses, reads the value."""
    try:
        from jsonargparse import ArgumentParser

        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--value", type=annotation)
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
        return instantiate(parser.parse_object({"value": value})).value
    except Exception:  # not installed, or a type that it does not know: the class gets the plain value
        return value


def _is_plain(annotation: Any, inside: tuple[Any, ...]) -> bool:
    """True if no value of the annotated type is an imported object."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Literal, typing.Annotated):
        return origin is typing.Literal or _is_plain(typing.get_args(annotation)[0], inside)
    if origin in (typing.Union, types.UnionType) or origin in _CONTAINERS:
        return all(each is ... or _is_plain(each, inside) for each in typing.get_args(annotation))
    if annotation is None or annotation in _PLAIN:
        return True
    if not isinstance(annotation, type):
        return False
    if dataclasses.is_dataclass(annotation) and annotation not in inside:
        try:
            hints = typing.get_type_hints(annotation)
        except Exception:  # a name that cannot be resolved
            return False
        return all(_is_plain(hint, (*inside, annotation)) for hint in hints.values())
    return issubclass(annotation, Enum)


def _takes_text(annotation: Any) -> bool:
    """True if text may be the value itself, not the name of an object."""
    if annotation in (Any, str, object):
        return True
    return typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Literal, typing.Annotated) and any(
        isinstance(each, str) or _takes_text(each) for each in typing.get_args(annotation)
    )
