"""SHA-256 digests of plain data and tensors, equal in every process and on every machine.

The digest of a value is SHA-256 over a type tag and the value's bytes. A container is digested by the digests of
its items, so an object that occurs many times is digested once. ``FORMAT.md`` specifies this for other readers.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "digest_of",
]


def digest_of(value: Any) -> str:
    """The digest of a value, 64 hexadecimal digits.

    The order of dicts and sets does not change it; the order of lists and tuples does. For a tensor dtype, shape and
    values (bit by bit) count; strides, device and shared memory do not.

    Raises:
        TypeError: the value holds something that is neither a tensor nor plain data.
        RecursionError: the value contains itself.

    >>> digest_of({"a": 1, "b": [2.0, None]}) == digest_of({"b": [2.0, None], "a": 1})
    True
    >>> digest_of([1, 2]) == digest_of([2, 1])
    False
    """
    return _digest(value, {}).hex()


def _digest(value: Any, done: dict[int, bytes]) -> bytes:
    if id(value) not in done:
        sha256 = hashlib.sha256()
        for part in _parts(value, done):
            sha256.update(part)
        done[id(value)] = sha256.digest()
    return done[id(value)]


def _parts(value: Any, done: dict[int, bytes]) -> Iterable[Any]:
    if isinstance(value, Tensor) and value.layout == torch.sparse_coo:
        entries = value.detach().cpu().coalesce()
        yield f"sparse:{','.join(map(str, value.shape))}:".encode()
        yield _digest(entries.indices(), {})  # made here: by its id it would be taken for another one later
        yield _digest(entries.values(), {})
    elif isinstance(value, Tensor):
        values = value.detach().cpu().contiguous()
        yield f"tensor:{_name(value.dtype)}:{','.join(map(str, value.shape))}:".encode()
        # an empty tensor cannot be viewed as bytes
        yield values.reshape(-1).view(torch.uint8).numpy() if values.numel() else b""
    elif value is None or isinstance(value, bool | int):
        yield f"{type(value).__name__}:{value}".encode()
    elif isinstance(value, float | complex):
        numbers = (value,) if isinstance(value, float) else (value.real, value.imag)
        yield f"{type(value).__name__}:".encode() + struct.pack(f"<{len(numbers)}d", *numbers)
    elif isinstance(value, str | bytes):
        yield f"{type(value).__name__}:".encode()
        yield value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    elif isinstance(value, dict):
        yield b"dict:"
        yield from sorted(_digest(key, done) + _digest(item, done) for key, item in value.items())
    elif isinstance(value, list | tuple | set):
        kind = next(kind for kind in (list, tuple, set) if isinstance(value, kind))
        items = [_digest(item, done) for item in value]
        yield f"{kind.__name__}:".encode()
        yield from sorted(items) if kind is set else items
    elif isinstance(value, torch.dtype | torch.device):
        yield f"{type(value).__name__}:{_name(value)}".encode()
    else:
        raise TypeError(type(value).__name__)


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.")
