"""Hyper-parameters as plain data with notes of their types, and back.

A note is a dict of text: ``path`` (the keys that lead to the value), ``kind``, and what else the kind needs. A class
is only noted by its name: it is looked up among the classes that the user's own code refers to, and nothing is
imported. Values that cannot be plain data are dropped, each by its dotted name.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, UnsupportedValueType
from torch import Tensor

from tinyq_lightning.file.factory import is_lightning_class
from tinyq_lightning.file.plain import plain
from tinyq_lightning.file.tensor_kind import kind_of_tensor, with_kind
from tinyq_lightning.namespaces import namespace_of

__all__ = [
    "ClassUnknown",
    "InterpolationFound",
    "can_be_given",
    "escaped",
    "restored",
    "typed_entries",
]

_FACTORIES: dict[str, Any] = {kind.__name__: kind for kind in (int, float, str, bool, list, dict, set, tuple)}
_PATHS: dict[str, Any] = {
    "PosixPath": Path,
    "WindowsPath": Path,
    "PurePosixPath": PurePosixPath,
    "PureWindowsPath": PureWindowsPath,
}
_BUILTIN: dict[str, Callable[[Any], Any]] = {
    "namespace": lambda value: Namespace(**value),
    "OrderedDict": OrderedDict,
    "Counter": Counter,
    "frozenset": frozenset,
    "Size": torch.Size,
}
_LIVE = re.compile(r"(?<!\\)(?:\\\\)*\$\{")
"""Text in which OmegaConf would resolve something: ``${`` after an even number of backslashes."""


class ClassUnknown(Exception):  # noqa: N818
    """The class of a value is none that the user's code refers to."""


class InterpolationFound(Exception):  # noqa: N818
    """A configuration of the file holds an interpolation, which could call any resolver."""


def typed_entries(
    entries: Mapping[str, Any], prefix: str, dropped: list[str], notes: list[dict[str, Any]]
) -> dict[str, Any]:
    """The entries as plain data.

    Args:
        entries: such as hyper-parameters.
        prefix: the name of the entries, for ``dropped``.
        dropped: takes the dotted names of what cannot be plain data.
        notes: takes a note for each value that plain data changes.
    """
    return _Writer(prefix, dropped, notes).mapping(entries, (), isinstance(entries, Container))


class _Writer:
    def __init__(self, prefix: str, dropped: list[str], notes: list[dict[str, Any]]) -> None:
        self._prefix, self._dropped, self._notes = prefix, dropped, notes
        self._open: set[int] = set()  # containers being written, to find one that contains itself

    def mapping(self, value: Mapping[Any, Any], path: tuple[Any, ...], in_config: bool) -> dict[Any, Any]:
        kept: dict[Any, Any] = {}
        for key in value:
            marks = len(self._notes), len(self._dropped)
            is_plain = type(key) in (str, int, float, bool, type(None))
            if path and not is_plain:
                raise TypeError("a key cannot be held, and a mapping without it would be another")
            try:
                if not is_plain:
                    raise TypeError(type(key).__name__)
                missing = isinstance(value, DictConfig) and OmegaConf.is_missing(value, key)
                item = "???" if missing else value[key]
                kept[plain(key)] = self.value(item, (*path, plain(key)), in_config)
            except (TypeError, RecursionError, OmegaConfBaseException):
                del self._notes[marks[0] :], self._dropped[marks[1] :]
                if path and not can_be_given(key):
                    raise
                self._dropped.append(".".join(map(str, (self._prefix, *path, key))))
        return kept

    def value(self, value: Any, path: tuple[Any, ...], in_config: bool) -> Any:
        if id(value) in self._open:
            raise TypeError("it contains itself")
        self._open.add(id(value))
        try:
            return self._value(value, path, in_config)
        finally:
            self._open.discard(id(value))

    def _value(self, value: Any, path: tuple[Any, ...], in_config: bool) -> Any:
        kind = type(value)
        if isinstance(value, Enum):
            self._note(path, "enum", cls=kind, name=value.name)
            try:
                return plain(value.value)
            except TypeError:
                return plain(value.name)
        if kind is str:
            return plain(escaped(value) if in_config else value)
        if isinstance(value, Container):
            if not in_config:
                self._note(path, "omegaconf")
            if isinstance(value, DictConfig):
                return self.mapping(value, path, True)
            return self._items(value, path, True)
        if isinstance(value, PurePath):
            self._note(path, "path", name=_named(kind, _PATHS))
            return plain(value)
        if isinstance(value, Namespace):
            self._note(path, "namespace", cls=None if kind is Namespace else kind)
            return self.mapping(vars(value), path, in_config)
        if isinstance(value, Mapping):
            self._note_mapping(value, path)
            return self.mapping(value, path, in_config)
        if isinstance(value, list | tuple):
            if kind is torch.Size:
                self._note(path, "Size")
            elif kind not in (list, tuple):
                self._note(path, "namedtuple" if hasattr(value, "_fields") else "sequence", cls=kind)
            items = self._items(value, path, in_config)
            return tuple(items) if isinstance(value, tuple) else items
        if isinstance(value, set | frozenset):
            return self._set(value, path, in_config)
        if isinstance(value, Tensor) and (name := kind_of_tensor(value)):
            self._note(path, "tensor", name=name)
        if isinstance(value, str | int | float | complex | bytes) and not _is_simple(kind):
            raise TypeError(kind.__name__)
        return plain(value)

    def _items(self, values: Any, path: tuple[Any, ...], in_config: bool) -> list[Any]:
        before = len(self._dropped)
        items = [self.value(values[i], (*path, i), in_config) for i in range(len(values))]
        if len(self._dropped) > before:
            raise TypeError("an item cannot be held, and a list without it would be another")
        return items

    def _set(self, value: Any, path: tuple[Any, ...], in_config: bool) -> Any:
        kind, before = type(value), len(self._notes)
        if kind not in (set, frozenset):
            raise TypeError(kind.__name__)
        items = [self.value(item, path, in_config) for item in value]
        if len(self._notes) > before:
            raise TypeError("an item of a set has no path for a note")
        if kind is set:
            return set(items)
        self._note(path, "frozenset")
        return sorted(items, key=repr)

    def _note_mapping(self, value: Mapping[Any, Any], path: tuple[Any, ...]) -> None:
        kind = type(value)
        if kind is dict:
            return
        if isinstance(value, defaultdict) and kind is defaultdict:
            factory = value.default_factory
            self._note(path, "defaultdict", name="" if factory is None else _named(factory, _FACTORIES))
        elif kind in (OrderedDict, Counter):
            self._note(path, kind.__name__)
        elif _is_attribute_dict(kind):
            self._note(path, "AttributeDict")
        else:
            self._note(path, "mapping", cls=kind)

    def _note(self, path: tuple[Any, ...], kind: str, cls: type | None = None, name: str | None = None) -> None:
        more = {} if cls is None else {"class": f"{cls.__module__}.{cls.__qualname__}"}
        self._notes.append({"path": list(path), "kind": kind, **more, **({} if name is None else {"name": name})})


def can_be_given(key: Any) -> bool:
    """True if an entry of this key can be given by a dotted name, as in ``load_quantized(path, Net, **{"a.b": …})``."""
    return type(key) is str and "." not in key


def restored(
    value: Any, note: Mapping[str, Any], find_class: Callable[[str], type | None], trust: bool, module_class: type
) -> Any:
    """The value as it was before :func:`typed_entries`.

    Args:
        value: plain data.
        note: what was noted of it.
        find_class: gives the class of a name, or None.
        trust: whether interpolations may stay in a configuration.
        module_class: whose hyper-parameters they are.

    Raises:
        ClassUnknown: ``find_class`` does not know the class; the exception has its name.
        InterpolationFound: a configuration holds an interpolation and is not trusted; the exception has it.
        Exception: the value is not of the form that the note promises.
    """
    kind, name = note["kind"], note.get("name")
    if "class" in note:
        base: Any = {
            "enum": Enum,
            "namespace": Namespace,
            "mapping": Mapping,
            "namedtuple": tuple,
            "sequence": (list, tuple),
        }
        found: Any = find_class(note["class"])
        if found is None or not issubclass(found, base[kind]):
            raise ClassUnknown(note["class"])
        if kind == "enum":
            return found[name] if name in found.__members__ else found(value)
        if kind == "namespace":
            return found(**value)
        if issubclass(found, Container):
            _refuse_live(value, trust)  # a class of the user's annotations, which the note names as a mapping
        return found._make(value) if kind == "namedtuple" else found(value)
    if kind == "omegaconf":
        return _configuration(value, trust)
    if kind == "AttributeDict":
        return _attribute_dict(value, module_class)
    if kind == "path":
        return _PATHS[str(name)](value)
    if kind == "tensor":
        return with_kind(value, str(name))
    if kind == "defaultdict":
        return defaultdict(_FACTORIES[name] if name else None, value)
    return _BUILTIN[kind](value)


def _attribute_dict(value: Any, module_class: Any) -> Any:
    """As LightningModule's ``hparams`` has it; of plain PyTorch, a dict whose items are attributes."""
    if not is_lightning_class(module_class):
        return _Attributes(value)
    return namespace_of(module_class).module("utilities.parsing").AttributeDict(value)


class _Attributes(dict[str, Any]):
    """A dict whose items are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no item {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


def _configuration(value: Any, trust: bool) -> Any:
    if not isinstance(value, dict | list | tuple):  # OmegaConf.create parses text as YAML
        raise TypeError(f"a configuration is made from a dict or a list, not from {type(value).__name__}")
    _refuse_live(value, trust)
    try:
        made = OmegaConf.create(value)
    except UnsupportedValueType:
        made = OmegaConf.create(value, flags={"allow_objects": True})
    _refuse_live(made, trust)
    return made


def _refuse_live(value: Any, trust: bool) -> None:
    live = None if trust else next((text for text in _texts(value) if _LIVE.search(text)), None)
    if live is not None:
        raise InterpolationFound(live)


def escaped(text: str) -> str:
    """The text in the form that OmegaConf reads as it stands, without resolving anything."""
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Container):
        value = OmegaConf.to_container(value, resolve=False)
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _texts(item)


def _named(kind: Any, known: Mapping[str, Any]) -> str:
    name = getattr(kind, "__name__", "")
    if name not in known or (known is _FACTORIES and known[name] is not kind):
        raise TypeError(str(kind))
    return str(name)


def _is_simple(kind: type) -> bool:
    return kind in (str, int, float, complex, bytes, bool) or kind.__module__.partition(".")[0] == "numpy"


def _is_attribute_dict(kind: type) -> bool:
    packages = ("lightning", "lightning_fabric", "pytorch_lightning")
    return kind.__name__ == "AttributeDict" and kind.__module__.partition(".")[0] in packages
