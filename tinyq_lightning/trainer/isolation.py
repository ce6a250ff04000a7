"""Puts a module, and all Python state that hangs on it, back exactly as it was before an evaluation."""

from __future__ import annotations

import functools
import gc
import inspect
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tinyq_lightning.namespaces import derives_from
from tinyq_lightning.trainer.held import is_frame
from tinyq_lightning.trainer.outside import Outside
from tinyq_lightning.trainer.state import class_state, package_of, state_of
from tinyq_lightning.trainer.values import CONSTANT_TYPES, is_written

__all__ = [
    "Snapshot",
    "preserved",
]

# Containers of more items are not copied where they belong to datasets: those are the data, not its state.
_DATA_ITEMS = 1000

_NO_USERS_CLASSES = {"builtins", "torch", "torchmetrics", *("lightning", "pytorch_lightning"), "tinyq_lightning"}


class Snapshot:
    """The state of everything that hangs on some objects, to be put back into the same objects.

    The graph of objects is walked once, from the attributes of the roots: containers and their subclasses,
    attributes and slots of objects, arrays, tensors, open files, random generators, and what users keep on their own
    classes. Other packages' machinery is left alone: Trainers, loggers, threads, functions.

    Args:
        roots: modules, data modules and other objects.
        data: dataloaders. Of these and of datasets the attributes, small containers and random generators are kept,
            so that they can be read again from the same place, but not the data.
        weights: copy the values of parameters too. Without it a parameter gets back its own memory, if that was
            exchanged, but not the values in it.
        also: a former snapshot; every object that it knows is part of this one.
        outside: watch what functions of the user's can change outside of objects: globals, closures, caches.

    Attributes:
        then: is called at the end of :meth:`put_back`.
    """

    def __init__(
        self,
        *roots: object,
        data: Iterable[object] = (),
        weights: bool = False,
        also: Snapshot | None = None,
        outside: bool = False,
    ) -> None:
        self._restores: list[tuple[str, Callable[[], object]]] = []
        self._written: list[tuple[str, Callable[[], object]]] = []
        self._seen: dict[int, tuple[object, str, bool]] = {}  # holds the objects: an id is theirs while they live
        self._functions: list[object] = []  # and classes, of the user's
        self._random = _global_random_state()
        self.then: list[Callable[[], object]] = []
        pending = [(loader, "dataloader", True) for loader in data]
        pending += [(root, type(root).__name__, False) for root in roots]
        pending += also._seen.values() if also else ()
        # the copies are to outlive an inference mode
        with torch.inference_mode(False), torch.no_grad(), _without_garbage_collection():
            while pending:
                value, name, is_data = pending.pop()
                if type(value) not in CONSTANT_TYPES and id(value) not in self._seen:
                    is_data = is_data or isinstance(value, Dataset | DataLoader)
                    self._seen[id(value)] = value, name, is_data
                    parts = self._keep(value, name, is_data, weights)
                    pending += [
                        (part, f"{name}{way}", is_data) for way, part in parts if type(part) not in CONSTANT_TYPES
                    ]
        self._outside = Outside(self._functions if outside else (), _is_of_the_user, self._seen)

    def _keep(self, value: object, name: str, is_data: bool, weights: bool) -> Iterator[tuple[str, object]]:
        """Note the state of one object, and give what hangs on it."""
        if is_data and (isinstance(value, Tensor | np.ndarray) or is_frame(value) or _size(value) > _DATA_ITEMS):
            return
        if isinstance(value, FunctionType | MethodType):
            self._functions.append(value)
        if (state := state_of(value, weights)) is not None:
            (self._written if is_written(value) else self._restores).append((name, state.restore))
            yield from state.parts
        elif not isinstance(value, type):
            return
        for kind in () if is_data else _classes_of(value):
            if (kind is value or id(kind) not in self._seen) and _is_users(kind):
                self._seen[id(kind)] = kind, kind.__name__, False
                self._functions.append(kind)
                of_class = class_state(kind)
                self._restores.append((kind.__name__, of_class.restore))
                yield from of_class.parts

    def put_back(self, files: bool = True) -> list[str]:
        """Everything as it was, in the same objects.

        Args:
            files: cut open files down to what was written then. False where a later snapshot has to find them as
                they are now.

        Returns:
            Where something was changed that cannot be put back, such as a generator.
        """
        with torch.inference_mode(False), torch.no_grad():
            states = [*self._restores, *(self._written if files else ())]
            changed = [name for name, restore in states if restore() is False]
        for restore_random, state in self._random:
            restore_random(state)
        for each in self.then:
            each()
        return changed

    def changed_outside(self) -> list[str]:
        """Where the user's functions changed what belongs to no object and is not put back, such as a global."""
        return self._outside.changed()


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Nothing is freed while a snapshot is taken, but the many small objects made would start the collector often."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _classes_of(value: object) -> Iterator[type]:
    """The classes of an object, or a class and those it inherits from, with the classes of these classes."""
    for kind in inspect.getmro(value if isinstance(value, type) else type(value)):
        yield kind
        if type(kind) is not type:
            yield from inspect.getmro(type(kind))


def _size(value: object) -> int:
    return len(value) if isinstance(value, dict | list | set | tuple | frozenset) else 0


@functools.cache
def _is_users(kind: type) -> bool:
    """Whether the attributes of a class are the user's state, since the class is the user's own."""
    if package_of(kind) in _NO_USERS_CLASSES:
        return False
    return derives_from(kind, "LightningModule", "LightningDataModule") or _is_from_users_file(kind.__module__)


def _is_of_the_user(value: Any) -> bool:
    """Whether a class, a function or a module is written by the user."""
    module = value.__name__ if isinstance(value, ModuleType) else value.__module__
    return isinstance(module, str) and module.partition(".")[0] not in _NO_USERS_CLASSES and _is_from_users_file(module)


@functools.cache
def _is_from_users_file(module: str) -> bool:
    if module.partition(".")[0] in sys.stdlib_module_names - {"__main__"}:
        return False
    return "-packages" not in (getattr(sys.modules.get(module), "__file__", None) or "")


def _global_random_state() -> list[tuple[Callable[[Any], object], Any]]:
    """Of the generators that belong to no object: what puts each back, and its state."""
    states: list[tuple[Callable[[Any], object], Any]] = [
        (random.setstate, random.getstate()),
        (np.random.set_state, np.random.get_state()),
        (torch.set_rng_state, torch.get_rng_state()),
    ]
    if torch.cuda.is_available():
        states.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    return states


@contextmanager
def preserved(module: nn.Module, weights: bool) -> Iterator[None]:
    """Put back, after the block, the :class:`Snapshot` of ``module``.

    Args:
        module: what to preserve.
        weights: keep the values of parameters too, at the cost of a copy of them.
    """
    snapshot = Snapshot(module, weights=weights)
    try:
        yield
    finally:
        snapshot.put_back()
