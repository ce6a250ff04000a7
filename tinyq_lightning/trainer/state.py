"""What is kept of one object: how its state is put back into the same object, and which objects hang on it."""

from __future__ import annotations

import array
import contextlib
import functools
import gc
import io
import itertools
import operator
import pickle
import random
import types
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tinyq_lightning.namespaces import derives_from
from tinyq_lightning.trainer.held import HELD, is_database, is_frame, of_database, of_frame
from tinyq_lightning.trainer.values import (
    CONSTANT_TYPES,
    CONSTANTS,
    Parts,
    State,
    attributes_of,
    enumerated,
    of_array,
    of_bit_generator,
    of_file,
    of_numpy_random_state,
    of_random,
    of_tensor,
    of_torch_generator,
    watched,
)

__all__ = [
    "class_state",
    "is_ours",
    "package_of",
    "state_of",
]

# Their objects are machinery: threads, connections, logs. To set these back would break them.
_MACHINERY = {
    *("_thread", "asyncio", "concurrent", "contextvars", "ctypes", "importlib", "logging", "multiprocessing", "queue"),
    *("socket", "ssl", "subprocess", "tempfile", "threading", "weakref"),
    *("lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning", "tinyq_lightning"),
    *("torch", "triton"),
    *("PIL", "clearml", "comet_ml", "matplotlib", "mlflow", "neptune", "ray", "tensorboard", "tqdm", "wandb"),
}

# Classes of torch whose objects hold state like the user's own.
_TORCH_STATE = (
    *(nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler),
    *(torch.utils.data.Dataset, torch.utils.data.Sampler, torch.utils.data.DataLoader),
    *(torch.amp.GradScaler, torch.distributions.Distribution, torch.quasirandom.SobolEngine),
)

_PLAIN_CONTAINERS = frozenset((dict, list, set, deque, tuple, frozenset, OrderedDict, defaultdict))

_MISSING = object()

_GENERATORS = (types.GeneratorType, types.AsyncGeneratorType, types.CoroutineType)

# Iterators over iterators that are looked into.
_MAX_DEPTH = 8


def package_of(kind: Any) -> str:
    """The name of the top-level package that a class or function comes from; empty if it says none."""
    module = getattr(kind, "__module__", None)
    return module.partition(".")[0] if isinstance(module, str) else ""


def is_ours(kind: type) -> bool:
    """Whether a class is one of this package, or derives from one."""
    return any(package_of(base) == "tinyq_lightning" for base in kind.__mro__)


def state_of(value: Any, weights: bool) -> State | None:
    """The state of one object; None if it has none of its own, or none that may be set back.

    Args:
        value: any object.
        weights: copy the values of parameters too.
    """
    if isinstance(value, (*CONSTANTS, type, types.FunctionType)):
        return None
    if is_frame(value):
        return of_frame(value)
    if is_database(value):
        return of_database(value)
    if isinstance(value, Tensor):  # one of ours is a weight that its codes give
        return None if package_of(type(value)) == "tinyq_lightning" else of_tensor(value, weights)
    if (of_kind := _reader(cast(Hashable, type(value)))) is not None:
        return of_kind(value)
    if _is_logger_or_trainer(cast(Hashable, type(value))) or (
        package_of(type(value)) in _MACHINERY and not isinstance(value, _TORCH_STATE)
    ):
        return None
    if package_of(type(value)) == "tinyq_lightning":
        return None  # quantized layers are put in and taken out as they are
    return _of_object(value)


@functools.lru_cache(maxsize=4096)
def _is_logger_or_trainer(kind: Hashable) -> bool:
    return derives_from(cast(type, kind), "Logger", "Trainer")


def _of_object(
    value: Any,
    contents: Callable[[], object] | None = None,
    items: Parts = (),
    changed: Callable[[], bool] | None = None,
) -> State | None:
    """Attributes and slots, and the contents if the object is a container as well."""
    if contents is not None and type(value) in _PLAIN_CONTAINERS:
        return State(contents, items, changed)
    attributes, slots = attributes_of(value), _slots(value)
    if attributes is None and not slots and contents is None:
        return None
    before = dict(attributes or {})
    skipped = ("state",) if isinstance(value, torch.optim.Optimizer) else ()  # moments: as large as the weights
    of_a_run: Collection[str] = _set_by_a_run(cast(Hashable, type(value)))

    def restore() -> None:
        if contents is not None:
            contents()
        if attributes is not None:
            stays = {name: part for name, part in attributes.items() if name in of_a_run}
            attributes.clear()
            attributes.update(before | stays)
        for member, slot in slots:
            if slot is not _MISSING:
                member.__set__(value, slot)
            elif _read_slot(member, value) is not _MISSING:
                member.__delete__(value)

    named = {**before, **{member.__name__: slot for member, slot in slots}}
    return State(
        restore, [*items, *((f".{name}", part) for name, part in named.items() if name not in (*skipped, *of_a_run))]
    )


@functools.lru_cache(maxsize=4096)
def _set_by_a_run(kind: Hashable) -> Collection[str]:
    """What a run sets in a callback of a user's class that derives from ours."""
    return getattr(kind, "of_a_run", ()) if is_ours(cast(type, kind)) else ()


def _slots(value: object) -> list[tuple[types.MemberDescriptorType, object]]:
    """Each slot with what is in it. By descriptors: a subclass may have a property of the name."""
    return [(member, _read_slot(member, value)) for member in _members(cast(Hashable, type(value)))]


def _read_slot(member: types.MemberDescriptorType, value: object) -> object:
    try:
        return member.__get__(value)
    except AttributeError:
        return _MISSING


@functools.lru_cache(maxsize=4096)
def _members(kind: Hashable) -> tuple[types.MemberDescriptorType, ...]:
    members = (each for cls in cast(type, kind).__mro__ if "__slots__" in vars(cls) for each in vars(cls).values())
    return tuple(member for member in members if isinstance(member, types.MemberDescriptorType))


def _of_dict(value: dict[Any, Any]) -> State | None:
    kind = OrderedDict if isinstance(value, OrderedDict) else dict  # past what subclasses make of these methods
    items = dict(kind.items(value))

    def contents() -> None:
        kind.clear(value)
        kind.update(value, items)

    parts = [(f"[{key!r}]", item) for key, item in items.items() if type(item) not in CONSTANT_TYPES]
    return _of_object(
        value,
        contents,
        parts,
        lambda: len(value) != len(items) or any(value.get(key, _MISSING) is not item for key, item in items.items()),
    )


def _of_list(value: list[Any]) -> State | None:
    items = list.copy(value)
    return _of_object(
        value,
        lambda: list.__setitem__(value, slice(None), items),
        enumerated(items),
        lambda: len(value) != len(items) or any(now is not item for now, item in zip(value, items, strict=True)),
    )


def _of_deque(value: deque[Any]) -> State | None:
    items = list(value)

    def contents() -> None:
        deque.clear(value)
        deque.extend(value, items)

    return _of_object(value, contents, enumerated(items))


def _of_set(value: set[Any]) -> State | None:
    items = set(value)

    def contents() -> None:
        set.clear(value)
        set.update(value, items)

    return _of_object(value, contents, enumerated(items))


def _of_tuple(value: Iterable[Any]) -> State | None:
    return _of_object(value, lambda: None, enumerated(value), lambda: False)


def _of_buffer(value: Any) -> State:
    items = value[:]
    return State(lambda: value.__setitem__(slice(None), items))


def _of_iterator(value: Iterator[Any]) -> State | None:
    """Of an iterator that is not written in Python, such as one of a list or of a DataLoader."""
    if attributes_of(value) is not None and package_of(type(value)) != "torch":
        return _of_object(value)

    return _of_place(value)


def _of_place(value: Any) -> State:
    return watched(lambda: _place(value, 0))


def _place(value: Any, depth: int) -> object:
    """Where an iterator stands: as it would be pickled, its length, or where those stand that it reads from."""
    if package_of(type(value)) == "torch":
        return getattr(value, "_num_yielded", 0)
    if isinstance(value, _GENERATORS):
        return _place_of_generator(value, depth)
    if isinstance(value, itertools.count):
        return repr(value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of itertools, from Python 3.12 on
            return pickle.dumps(value)
    except Exception:  # it holds what cannot be pickled
        if (left := _length_left(value)) is not None:
            return left
    held = [part for each in gc.get_referents(value) for part in (each if type(each) is tuple else (each,))]
    read = [each for each in held if isinstance(each, Iterator)]
    if not read or depth == _MAX_DEPTH:
        return object()  # unlike any other: nothing tells whether it has been read
    return [_place(each, depth + 1) for each in read]


def _place_of_generator(value: Any, depth: int) -> object:
    """The line and the variables of it and of those that it delegates to by ``yield from``, if it has begun."""
    places: list[object] = []
    while isinstance(value, types.GeneratorType):
        frame = value.gi_frame
        places.append(frame and (frame.f_lasti, {name: _shown(part) for name, part in frame.f_locals.items()}))
        value = value.gi_yieldfrom
    if isinstance(value, Iterator):
        left = _length_left(value)  # before it is pickled, with all that it is over
        places.append(_place(value, depth + 1) if left is None else left)
    return places


def _length_left(value: Any) -> int | None:
    with contextlib.suppress(Exception):
        return operator.length_hint(value) if hasattr(type(value), "__length_hint__") else None
    return None


def _shown(value: object) -> object:
    return value if type(value) in CONSTANT_TYPES else id(value)


def _of_partial(value: functools.partial[Any]) -> State | None:
    return _of_object(
        value, lambda: None, [(".func", value.func), (".args", value.args), (".keywords", value.keywords)]
    )


def _of_method(value: types.MethodType) -> State:
    return State(lambda: None, [("", value.__self__)])


def _of_numpy_generator(value: Any) -> State:
    return State(lambda: None, [(".bit_generator", value.bit_generator)])


_BY_TYPE: dict[type | tuple[type, ...], Callable[[Any], State | None]] = {
    dict: _of_dict,
    list: _of_list,
    deque: _of_deque,
    set: _of_set,
    (tuple, frozenset): _of_tuple,
    (bytearray, array.array): _of_buffer,
    np.ndarray: of_array,
    random.Random: of_random,
    np.random.BitGenerator: of_bit_generator,
    np.random.Generator: _of_numpy_generator,
    np.random.RandomState: of_numpy_random_state,
    torch.Generator: of_torch_generator,
    io.IOBase: of_file,
    _GENERATORS: _of_place,
    functools.partial: _of_partial,
    types.MethodType: _of_method,
    Iterator: _of_iterator,
    **HELD,
}


@functools.lru_cache(maxsize=4096)
def _reader(kind: Hashable) -> Callable[[Any], State | None] | None:
    return next((reader for kinds, reader in _BY_TYPE.items() if issubclass(cast(type, kind), kinds)), None)


def class_state(kind: type) -> State:
    """What users keep on a class, next to its methods: counters, lists, caches."""
    before = _class_attributes(kind)

    def restore() -> None:
        after = _class_attributes(kind)
        for name in after.keys() - before.keys():
            delattr(kind, name)
        for name, value in before.items():
            if after.get(name, _MISSING) is not value:
                setattr(kind, name, value)

    return State(restore, ((f".{name}", part) for name, part in before.items()))


def _class_attributes(kind: type) -> dict[str, object]:
    return {
        name: value
        for name, value in vars(kind).items()
        if not name.startswith(("__", "_abc_"))
        and not isinstance(value, types.BuiltinFunctionType)
        and not any(hasattr(type(value), method) for method in ("__get__", "__set__"))
    }
