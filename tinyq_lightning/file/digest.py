"""SHA-256 of plain data and tensors by their content, the same in any process, on any machine, in any language.

The digest of a value is SHA-256 over a tag and what the value holds; containers hold the digests of their
items, so each is computed once however often it occurs. ``FORMAT.md`` gives the table for other readers.
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

    Mappings and sets have no order here, lists and tuples do. A tensor counts by dtype, shape and values, bit
    by bit; its strides, its device and whether it shares memory do not count.

    Raises:
        TypeError: there is something in it that is neither a tensor nor plain data.
        RecursionError: it contains itself.

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
        # the empty tensor has no memory to look at
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
