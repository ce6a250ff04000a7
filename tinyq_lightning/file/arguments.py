"""Which arguments a module is built with: the stored hyper-parameters, under those that the user gives."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from typing import Any

from tinyq_lightning.errors import CheckpointError, ModelError
from tinyq_lightning.file.factory import name_of, parameters_of
from tinyq_lightning.file.plain import copied
from tinyq_lightning.file.trust import call_with, import_class
from tinyq_lightning.file.typed import ClassUnknown, InterpolationFound, can_be_given, restored
from tinyq_lightning.file.validate import HYPER_PARAMETERS, HYPER_PARAMETERS_NAME, HYPER_PARAMETERS_TYPE

__all__ = [
    "Arguments",
]


class Arguments:
    """The hyper-parameters of a file as arguments of a class.

    Args:
        module_class: the class, or a function that makes the module.
        content: of a checkpoint, float or quantized.
        given: the user's arguments. A name such as ``block.cls`` gives one entry of a stored argument.
        trust: whether what the file names may be imported and called.
        source: the file's name, for errors.

    Attributes:
        stored: the hyper-parameters as they were when the module was made, with the given entries.
        from_cli: whether LightningCLI made the module.

    Raises:
        CheckpointError: the file could not hold an argument that is not given, or its interpolations are not trusted.
    """

    def __init__(
        self, module_class: Any, content: Mapping[str, Any], given: Mapping[str, Any], trust: bool, source: str
    ) -> None:
        self._class, self._given, self._trust, self._source = module_class, given, trust, source
        tinyq = content.get("tinyq", {})
        self._takes = parameters_of(module_class)
        name = content.get(HYPER_PARAMETERS_NAME)
        takes_it = isinstance(name, str) and name in self._takes and not _is_open(self._takes[name])
        self._holder: str | None = name if takes_it else None
        stored = copied(dict(_items(content.get(HYPER_PARAMETERS, {}))))
        self.from_cli = stored.pop("_instantiator", None) is not None
        self._put_given_entries(stored)
        kinds: Mapping[str, str] = tinyq.get("configs", {})
        notes = [{"path": [key], "kind": kind} for key, kind in kinds.items()] + list(tinyq.get("types", ()))
        if content.get(HYPER_PARAMETERS_TYPE) is not None:
            notes.append({"path": [], "kind": "omegaconf"})
        elif self._holder is not None:
            notes.append({"path": [], "kind": "AttributeDict"})
        absent = [
            name.partition(".")[2] for name in tinyq.get("dropped", ()) if name.startswith(f"{HYPER_PARAMETERS}.")
        ]
        unknown: dict[str, str] = {}
        self.stored: Any = self._restored(stored, notes, unknown)
        self._refuse_absent(absent, unknown)

    def for_call(self) -> dict[str, Any]:
        """Keyword arguments of the class."""
        stored: Mapping[str, Any]
        if self._holder is not None:
            stored = {self._holder: self.stored}
        else:
            stored = {key: value for key, value in _items(self.stored) if isinstance(key, str)}
        top = {name: value for name, value in self._given.items() if "." not in name}
        arguments = {**stored, **top}
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in self._takes.values()):
            return arguments
        unknown = sorted(set(top) - set(self._takes))
        if unknown:
            raise TypeError(f"it takes no argument {', '.join(unknown)}")
        return {name: value for name, value in arguments.items() if name in self._takes or name == "_class_path"}

    def _put_given_entries(self, stored: dict[str, Any]) -> None:
        for name, value in self._given.items():
            *way, last = self._below_holder(name).split(".")
            place: Any = stored
            for key in way:
                place = next((item for at, item in place.items() if str(at) == key), None)
                if not isinstance(place, dict):
                    raise TypeError(f"it takes no argument {name}: the file holds no entry {key!r} to put it into")
            if way or self._below_holder(name) != name:
                place[last] = value

    def _below_holder(self, name: str) -> str:
        """The name of an entry as it is in the file, which does not name the argument that holds all of them."""
        holder = f"{self._holder}."
        return name.removeprefix(holder) if self._holder is not None else name

    def _restored(self, stored: dict[str, Any], notes: list[Mapping[str, Any]], unknown: dict[str, str]) -> Any:
        """The hyper-parameters with their types; ``unknown`` takes the names of classes by what they are needed for."""
        root: dict[Any, Any] = {"": stored}
        for note in sorted(notes, key=lambda note: -len(note["path"])):  # a value before its container
            path = ["", *note["path"]]
            name = ".".join(map(str, path[1:]))
            if self._is_given(name):
                continue
            try:
                value = restored(_item_at(root, path), note, self._find_class, self._trust, self._class)
                _put_item(root, path, value)
            except ClassUnknown as error:
                way = takewhile(can_be_given, note["path"])
                unknown.setdefault(".".join(way) or str(note["path"][0]), str(error))
            except InterpolationFound as found:
                raise CheckpointError(
                    f"{self._source}: the hyper-parameter {self._shown(name)!r} holds the interpolation "
                    f"{str(found)!r}, which could call any resolver. {self._advice(name)}"
                ) from None
            except Exception as error:
                raise CheckpointError(
                    f"{self._source}: the file is damaged: the hyper-parameter {self._shown(name)!r} is no "
                    f"{note['kind']}: {error}"
                ) from error
        return root[""]

    def _find_class(self, name: str) -> type | None:
        with suppress(ModelError):
            return import_class(name, object) if self._trust else _classes_near(self._class).get(name)
        return None

    def _is_given(self, name: str) -> bool:
        given = [self._below_holder(each) for each in self._given]
        return self._holder in self._given or any(f"{name}.".startswith(f"{each}.") for each in given)

    def _refuse_absent(self, absent: Iterable[str], unknown: Mapping[str, str]) -> None:
        outer = [each for each in unknown if not any(each.startswith(f"{other}.") for other in unknown)]
        not_held, of_unknown, name = self._wanted(absent), self._wanted(outer), name_of(self._class)
        told = [f"the file could not hold {', '.join(not_held)}, which {name} was made with"] if not_held else []
        if of_unknown:
            classes = dict.fromkeys(unknown[each] for each in outer if self._shown(each) in of_unknown)
            need = "needs" if len(of_unknown) == 1 else "need"
            told.append(
                f"{', '.join(of_unknown)} {need} {', '.join(classes)}, which {name} does not "
                "refer to in annotations or defaults (annotate the argument with it, or pass trust=True, --trust on "
                "the command line, if you trust who made the file)"
            )
        if asked := [*not_held, *of_unknown]:
            as_before = "it as it was" if len(asked) == 1 else "them as they were"
            raise CheckpointError(
                f"{self._source}: {'; '.join(told)}: give {as_before}, as in {call_with(self._class, asked[0])}"
            )

    def _wanted(self, names: Iterable[str]) -> list[str]:
        """Those that the class takes and that are not given, as the user gives them."""
        takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in self._takes.values())
        return [
            self._shown(name)
            for name in names
            if not self._is_given(name) and (self._holder or takes_any or name.partition(".")[0] in self._takes)
        ]

    def _shown(self, name: str) -> str:
        return ".".join(filter(None, (self._holder, name)))

    def _advice(self, name: str) -> str:
        return (
            "Pass trust=True (--trust on the command line) if you trust who made the file, or give the argument as in "
            f"{call_with(self._class, self._shown(name) or 'argument')}"
        )


def _is_open(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def _items(stored: Any) -> Iterator[tuple[Any, Any]]:
    """The entries that have a value; a configuration may have some that are missing."""
    for key in stored:
        with suppress(Exception):
            yield key, stored[key]


def _item_at(root: Any, path: Sequence[Any]) -> Any:
    for key in path:
        root = root[key]
    return root


def _put_item(root: Any, path: Sequence[Any], value: Any) -> None:
    """Put a value at a path; a tuple on the way is replaced by a new one."""
    place = _item_at(root, path[:-1])
    if isinstance(place, tuple):
        _put_item(root, path[:-1], (*place[: path[-1]], value, *place[path[-1] + 1 :]))
    else:
        place[path[-1]] = value


def _classes_near(module_class: Any) -> dict[str, type]:
    """The classes that a class refers to: in it, in the annotations and in the defaults of ``__init__``.

    Of a function, those that its annotations and defaults refer to.
    """
    found: dict[str, type] = {}

    def add(value: Any) -> None:
        if isinstance(value, type):
            found.setdefault(f"{value.__module__}.{value.__qualname__}", value)
        for each in typing.get_args(value):
            add(each)

    is_class = isinstance(module_class, type)
    for cls in module_class.__mro__ if is_class else (module_class,):
        for value in vars(cls).values() if is_class else ():
            add(value if isinstance(value, type) else None)
        init = vars(cls).get("__init__") if is_class else cls
        if init is None:
            continue
        with suppress(Exception):  # names in annotations that cannot be resolved
            for annotation in typing.get_type_hints(init).values():
                add(annotation)
        with suppress(ValueError, TypeError):
            for parameter in inspect.signature(init).parameters.values():
                for value in _with_items(parameter.default):
                    add(type(value))
                    add(value)
    return found


def _with_items(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _with_items(item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _with_items(item)
