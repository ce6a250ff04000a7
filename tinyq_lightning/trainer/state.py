"""What is kept of one object: how its state is put back into the same object, and which objects hang on it."""

from __future__ import annotations

import array
import functools
import io
import pickle
import random
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.fabric.loggers.logger import Logger
from lightning.pytorch import Trainer
from torch import Tensor, nn

__all__ = [
    "CONSTANTS",
    "State",
    "class_state",
    "is_written",
    "package_of",
    "state_of",
]

Parts = Iterable[tuple[str, object]]

CONSTANTS = (type(None), bool, int, float, complex, str, bytes, type, range, slice, types.ModuleType)
"""Types whose values never change, or are nobody's own state."""

_CONSTANTS = frozenset(CONSTANTS)

# Their objects are machinery: threads, connections, logs. To set these back would break them.
_MACHINERY = {
    *("_thread", "asyncio", "concurrent", "contextvars", "ctypes", "importlib", "logging", "multiprocessing", "queue"),
    *("socket", "ssl", "subprocess", "tempfile", "threading", "weakref"),
    *(
        "lightning",
        "lightning_fabric",
        "lightning_utilities",
        "pytorch_lightning",
        "tinyq_lightning",
        "torch",
        "triton",
    ),
    *("PIL", "clearml", "comet_ml", "matplotlib", "mlflow", "neptune", "ray", "tensorboard", "tqdm", "wandb"),
}

# Classes of torch whose objects hold state like the user's own.
_TORCH_STATE = (
    *(nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler),
    *(torch.utils.data.Dataset, torch.utils.data.Sampler, torch.utils.data.DataLoader),
)

# Larger arrays and tensors are not copied, only watched.
_MAX_BYTES = 2**28

_MISSING = object()


class State(NamedTuple):
    """What is kept of one object.

    Attributes:
        restore: puts the state back. It returns False if the object has changed and cannot be put back.
        parts: the objects that hang on it, each with the way there.
    """

    restore: Callable[[], object]
    parts: Parts = ()


def package_of(kind: type) -> str:
    """The name of the top-level package that a class comes from."""
    return kind.__module__.partition(".")[0]


def state_of(value: Any, weights: bool) -> State | None:
    """The state of one object; None if it has none of its own, or none that may be set back.

    Args:
        value: any object.
        weights: copy the values of parameters too.
    """
    if isinstance(value, (*CONSTANTS, types.FunctionType, types.BuiltinFunctionType)):
        return None
    if isinstance(value, Tensor):
        return _of_tensor(value, weights)
    for kinds, of_kind in _BY_TYPE.items():
        if isinstance(value, kinds):
            return of_kind(value)
    if isinstance(value, Logger | Trainer) or (
        package_of(type(value)) in _MACHINERY and not isinstance(value, _TORCH_STATE)
    ):
        return None
    if package_of(type(value)) == "tinyq_lightning":
        return None  # quantized layers are put in and taken out as they are
    return _of_object(value)


def _of_object(value: Any, contents: Callable[[], object] | None = None, items: Parts = ()) -> State | None:
    """Attributes and slots, and the contents if the object is a container as well."""
    found, slots = getattr(value, "__dict__", None), _slots(value)
    attributes = found if isinstance(found, dict) else None
    if attributes is None and not slots and contents is None:
        return None
    before = dict(attributes or {})
    skipped = ("state",) if isinstance(value, torch.optim.Optimizer) else ()  # moments: as large as the weights

    def restore() -> None:
        if contents is not None:
            contents()
        if attributes is not None:
            attributes.clear()
            attributes.update(before)
        for name, slot in slots.items():
            if slot is not _MISSING:
                object.__setattr__(value, name, slot)
            elif hasattr(value, name):
                object.__delattr__(value, name)

    named = {**before, **slots}
    return State(restore, [*items, *((f".{name}", part) for name, part in named.items() if name not in skipped)])


def _slots(value: object) -> dict[str, object]:
    found: dict[str, object] = {}
    for kind in type(value).__mro__:
        names = vars(kind).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name not in ("__dict__", "__weakref__") and isinstance(vars(kind).get(name), types.MemberDescriptorType):
                found[name] = getattr(value, name, _MISSING)
    return found


def _of_dict(value: dict[Any, Any]) -> State | None:
    kind = OrderedDict if isinstance(value, OrderedDict) else dict  # past what subclasses make of these methods
    items = dict(kind.items(value))

    def contents() -> None:
        kind.clear(value)
        kind.update(value, items)

    parts = [(f"[{key!r}]", item) for key, item in items.items() if type(item) not in _CONSTANTS]
    return _of_object(value, contents, parts)


def _of_list(value: list[Any]) -> State | None:
    items = list.copy(value)
    return _of_object(value, lambda: list.__setitem__(value, slice(None), items), _numbered(items))


def _of_deque(value: deque[Any]) -> State | None:
    items = list(value)

    def contents() -> None:
        deque.clear(value)
        deque.extend(value, items)

    return _of_object(value, contents, _numbered(items))


def _of_set(value: set[Any]) -> State | None:
    items = set(value)

    def contents() -> None:
        set.clear(value)
        set.update(value, items)

    return _of_object(value, contents, _numbered(items))


def _of_tuple(value: Iterable[Any]) -> State | None:
    return _of_object(value, lambda: None, _numbered(value))


def _of_buffer(value: Any) -> State:
    items = value[:]
    return State(lambda: value.__setitem__(slice(None), items))


def _numbered(items: Iterable[Any]) -> Parts:
    return [(f"[{index}]", item) for index, item in enumerate(items) if type(item) not in _CONSTANTS]


def _of_array(value: np.ndarray[Any, Any]) -> State | None:
    if not value.flags.writeable:
        return None
    if value.nbytes > _MAX_BYTES:
        return _watched(lambda: hash(value.ravel()[:: max(1, value.size // 4096)].tobytes()))
    copy = value.copy()
    return State(lambda: np.copyto(value, copy), _numbered(copy.ravel()) if value.dtype.hasobject else ())


def _of_tensor(value: Tensor, weights: bool) -> State:
    alias, grad = value.detach(), value.grad if value.is_leaf else None
    is_weight = isinstance(value, nn.Parameter) or value.requires_grad
    copy = alias.clone() if not value.is_meta and (weights or not is_weight) else None

    def restore() -> None:
        if not _same_memory(value, alias):
            value.data = alias
        if copy is not None:
            with torch.inference_mode(value.is_inference()):
                alias.copy_(copy)
        if value.is_leaf and value.grad is not grad:
            value.grad = grad

    return State(restore, ((name, part) for name, part in getattr(value, "__dict__", {}).items()))


def _same_memory(one: Tensor, other: Tensor) -> bool:
    if one.device != other.device or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.is_meta or one.layout != torch.strided or one.data_ptr() == other.data_ptr()


def _of_random(value: random.Random) -> State | None:
    try:
        state = value.getstate()
    except NotImplementedError:  # SystemRandom
        return None
    return State(lambda: value.setstate(state))


def _of_bit_generator(value: np.random.BitGenerator) -> State:
    state = value.state
    return State(lambda: setattr(value, "state", state))


def _of_torch_generator(value: torch.Generator) -> State:
    state = value.get_state()
    return State(lambda: value.set_state(state))


def is_written(value: object) -> bool:
    """Whether it is an open file that can be written to, other than one in memory."""
    in_memory = isinstance(value, io.StringIO | io.BytesIO)
    return isinstance(value, io.IOBase) and not in_memory and not value.closed and value.writable()


def _of_file(value: io.IOBase) -> State | None:
    try:
        if value.closed or not value.seekable():
            return None
        if value.writable():
            value.flush()
        place = value.tell()
        content = value.getvalue() if isinstance(value, io.StringIO | io.BytesIO) else None
        end = value.seek(0, io.SEEK_END)
        value.seek(place)
    except (OSError, ValueError):
        return _watched(lambda: _MISSING)

    def restore() -> bool:
        try:
            if content is not None:
                value.seek(0)
                value.truncate()
                value.write(content)
            elif value.writable():
                value.flush()
                value.truncate(end)
            value.seek(place)
        except (OSError, ValueError):
            return False
        return True

    return State(restore)


def _of_generator(value: Any) -> State:
    def place() -> object:
        frame = value.gi_frame
        return frame and (frame.f_lasti, {name: id(part) for name, part in frame.f_locals.items()})

    return _watched(place)


def _of_iterator(value: Iterator[Any]) -> State | None:
    """Of an iterator that is not written in Python, such as one of a list or of a DataLoader."""
    if hasattr(value, "__dict__") and package_of(type(value)) != "torch":
        return _of_object(value)

    def place() -> object:
        if package_of(type(value)) == "torch":
            return getattr(value, "_num_yielded", 0)
        try:
            return pickle.dumps(value)
        except Exception:
            return object()  # unlike any other: nothing tells whether it has been read

    return _watched(place)


def _watched(place: Callable[[], object]) -> State:
    """Of what cannot be put back: restoring it tells whether it has changed."""
    before = place()
    return State(lambda: place() == before)


def _of_partial(value: functools.partial[Any]) -> State | None:
    return _of_object(
        value, lambda: None, [(".func", value.func), (".args", value.args), (".keywords", value.keywords)]
    )


def _of_method(value: types.MethodType) -> State:
    return State(lambda: None, [("", value.__self__)])


def _of_numpy_generator(value: Any) -> State:
    return State(lambda: None, [(".bit_generator", value.bit_generator)])


def _of_numpy_random_state(value: np.random.RandomState) -> State:
    state = value.get_state()
    return State(lambda: value.set_state(state))


_BY_TYPE: dict[type | tuple[type, ...], Callable[[Any], State | None]] = {
    dict: _of_dict,
    list: _of_list,
    deque: _of_deque,
    set: _of_set,
    (tuple, frozenset): _of_tuple,
    (bytearray, array.array): _of_buffer,
    np.ndarray: _of_array,
    random.Random: _of_random,
    np.random.BitGenerator: _of_bit_generator,
    np.random.Generator: _of_numpy_generator,
    np.random.RandomState: _of_numpy_random_state,
    torch.Generator: _of_torch_generator,
    io.IOBase: _of_file,
    (types.GeneratorType, types.AsyncGeneratorType, types.CoroutineType): _of_generator,
    functools.partial: _of_partial,
    types.MethodType: _of_method,
    Iterator: _of_iterator,
}


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
        and not callable(value)
        and not any(hasattr(type(value), method) for method in ("__get__", "__set__"))
    }
