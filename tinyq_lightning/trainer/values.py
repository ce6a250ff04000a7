"""State of tensors, arrays, random generators and files, and of iterators, whose place can only be watched."""

from __future__ import annotations

import io
import random
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "CONSTANTS",
    "CONSTANT_TYPES",
    "MAX_COUNTS",
    "Parts",
    "State",
    "attributes_of",
    "enumerated",
    "has_values",
    "is_written",
    "of_array",
    "of_bit_generator",
    "of_file",
    "of_numpy_random_state",
    "of_random",
    "of_tensor",
    "of_torch_generator",
    "watched",
]

Parts = Iterable[tuple[str, object]]
"""Objects that hang on another, each with the way there, such as ``.name`` or ``[0]``."""

CONSTANTS = (type(None), bool, int, float, complex, str, bytes, range, slice, types.ModuleType)
"""Types whose values never change, or are nobody's own state."""

CONSTANT_TYPES = frozenset(CONSTANTS)
"""The same as a set, for the type of a value itself."""

# Larger arrays are not copied, only watched.
_MAX_BYTES = 2**28

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

MAX_COUNTS = 4096
"""A parameter of so many values that is not trained may be a count; the values of others are weights."""


class State(NamedTuple):
    """What is kept of one object.

    Attributes:
        restore: puts the state back. It returns False if the object has changed and cannot be put back.
        parts: the objects that hang on it, each with the way there.
        changed: whether its values are others; None where that is not known.
    """

    restore: Callable[[], object]
    parts: Parts = ()
    changed: Callable[[], bool] | None = None


def attributes_of(value: object) -> dict[str, Any] | None:
    """Its ``__dict__``, past what its class does when attributes are asked for; None if it has none."""
    try:
        found = object.__getattribute__(value, "__dict__")
    except Exception:  # a property, such as that of a proxy for what is not there
        return None
    return found if isinstance(found, dict) else None


def enumerated(items: Iterable[Any]) -> Parts:
    """Each item that may change, with its way."""
    return [(f"[{index}]", item) for index, item in enumerate(items) if type(item) not in CONSTANT_TYPES]


def of_array(value: np.ndarray[Any, Any]) -> State | None:
    """Its values; of a very large one, a few that tell whether it has changed."""
    if not value.flags.writeable:
        return None
    if value.nbytes > _MAX_BYTES:
        return watched(lambda: hash(value.ravel()[:: max(1, value.size // 4096)].tobytes()))
    copy, of_objects = value.copy(), value.dtype.hasobject

    def changed() -> bool:
        if of_objects:
            return any(now is not item for now, item in zip(value.flat, copy.flat, strict=True))
        return not np.array_equal(value, copy, equal_nan=value.dtype.kind in "fc")

    return State(lambda: np.copyto(value, copy), enumerated(copy.ravel()) if of_objects else (), changed)


def of_tensor(value: Tensor, weights: bool) -> State:
    """Its memory and gradient as objects, and its values unless it is a weight and those are not wanted.

    Of such a weight a few values are kept, which tell whether it has been changed.
    """
    # asked once: torch does not tell it of a view made in inference mode once its base is written to outside of that
    is_leaf = value.is_leaf
    alias, grad = value.detach(), value.grad if is_leaf else None
    is_weight = isinstance(value, nn.Parameter) or value.requires_grad
    counts = not value.requires_grad and value.numel() <= MAX_COUNTS
    copy = alias.clone() if not value.is_meta and (weights or not is_weight or counts) else None
    is_plain = has_values(value)
    watched_too = copy is None and is_plain and type(alias) is Tensor and alias.dtype in _DTYPES
    few = _few_values(alias).clone() if watched_too else None

    def restore() -> bool:
        if not _same_memory(value, alias):
            value.data = alias
        if copy is not None:
            with torch.inference_mode(value.is_inference()):
                alias.copy_(copy)
        if is_leaf and value.grad is not grad:
            value.grad = grad
        return few is None or _same_values(_few_values(alias), few)

    def changed() -> bool:
        return copy is None or not _same_memory(value, alias) or not _same_values(value, copy)

    parts = ((name, part) for name, part in (attributes_of(value) or {}).items())
    return State(restore, parts, changed if is_plain else None)


def has_values(tensor: Tensor) -> bool:
    """Whether it is one block of numbers in memory: strided, not nested, not on the meta device."""
    return tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_meta


def _few_values(tensor: Tensor) -> Tensor:
    return tensor.flatten()[:: max(1, tensor.numel() // 32)] if tensor.is_contiguous() else tensor[:1, ...]


def _same_values(one: Tensor, other: Tensor) -> bool:
    """Of two tensors of one shape, where NaN is the same as NaN."""
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())


def _same_memory(one: Tensor, other: Tensor) -> bool:
    if one.is_nested or other.is_nested:
        return one.is_nested and other.is_nested  # their shapes cannot always be asked for
    if one.device != other.device or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.is_meta or one.layout != torch.strided or one.data_ptr() == other.data_ptr()


def of_random(value: random.Random) -> State | None:
    """Where a generator of Python stands."""
    try:
        state = value.getstate()
    except NotImplementedError:  # SystemRandom
        return None
    return State(lambda: value.setstate(state))


def of_bit_generator(value: np.random.BitGenerator) -> State:
    """Where a generator of NumPy stands."""
    state = value.state
    return State(lambda: setattr(value, "state", state))


def of_torch_generator(value: torch.Generator) -> State:
    """Where a generator of torch stands."""
    state = value.get_state()
    return State(lambda: value.set_state(state))


def is_written(value: object) -> bool:
    """Whether it is an open file that can be written to, other than one in memory."""
    in_memory = isinstance(value, io.StringIO | io.BytesIO)
    return isinstance(value, io.IOBase) and not in_memory and not value.closed and value.writable()


def of_file(value: io.IOBase) -> State | None:
    """The place in an open file, and where it ends; of one in memory, its content."""
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
        return watched(object)  # unlike any other: nothing tells where it stands

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


def watched(place: Callable[[], object]) -> State:
    """Of what cannot be put back: restoring it tells whether it has changed."""
    before = place()
    return State(lambda: place() == before)


def of_numpy_random_state(value: np.random.RandomState) -> State:
    """Where one of NumPy's older generators stands."""
    state = value.get_state()
    return State(lambda: value.set_state(state))
