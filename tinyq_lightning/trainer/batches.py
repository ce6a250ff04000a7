"""What a batch holds: a digest that tells two batches apart, and its content for the next reader."""

from __future__ import annotations

import sys
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from tinyq_lightning.trainer.state import state_of
from tinyq_lightning.trainer.values import CONSTANT_TYPES, State, attributes_of, has_values

__all__ = [
    "KeptBatches",
    "batch_digest",
]

# So many values of each tensor, items at each end of a container and leaves of a batch go into its digest.
_SAMPLES, _ENDS, _LEAVES = 32, 128, 1024


def batch_digest(batch: Any) -> int:
    """A number that two batches share if they hold the same; from some values of each tensor, array, number, text.

    Of a container of more than 256 items the first and the last 128 count, and of all those the first 1024 leaves: two
    batches that differ elsewhere have one digest.
    """
    digest = 0
    for index, leaf in enumerate(_leaves(batch)):
        if index == _LEAVES:
            break
        digest = zlib.crc32(_bytes_of(leaf), digest)
    return digest


def _leaves(value: Any) -> Iterator[Any]:
    """In their order, each object once: those of a graph may name each other."""
    pending, seen = [value], dict[int, Any]()  # holds the objects, so that no other one gets their id
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor | np.ndarray | int | float | str | bytes):
            yield value
        elif id(value) not in seen:
            seen[id(value)] = value
            pending.extend(reversed(list(_items(value))))


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return _ends(list(value.values()))
    if isinstance(value, list | tuple):
        return _ends(list(value))
    known = (Tensor, np.ndarray, int, float, str, Mapping, list, tuple)
    return (item for item in (attributes_of(value) or {}).values() if isinstance(item, known))


def _ends(items: list[Any]) -> list[Any]:
    return items if len(items) <= 2 * _ENDS else items[:_ENDS] + items[-_ENDS:]


def _bytes_of(leaf: Any) -> bytes:
    if isinstance(leaf, Tensor):
        if hasattr(type(leaf), "to_local"):  # a DTensor: the part that this process holds
            leaf = cast(Any, leaf).to_local()
        if not has_values(leaf):
            return str(leaf.dtype).encode()
        flat = leaf.detach().flatten()
        return repr((tuple(leaf.shape), flat[:: max(1, flat.numel() // _SAMPLES)].tolist())).encode()
    if isinstance(leaf, np.ndarray):
        values = leaf.ravel()
        return repr((leaf.shape, values[:: max(1, values.size // _SAMPLES)].tolist())).encode()
    return repr(leaf).encode()


class KeptBatches:
    """The contents of batches that may belong to the dataset itself, put back when a loop is done with all of them.

    A batch is kept before the first hook of a transfer has it, until three more were fetched: two batches may share
    memory, and a later step may change an earlier batch. From then on only what something changed and others hold is
    kept, to the end of the loop; what a step changes in older batches stays changed. What torch's own collate function
    or another process makes is new for each reader, and is not kept. Nor are datasets, dataloaders and modules
    that a batch holds, or anything below them.

    Args:
        loaders: where batches may come from.
    """

    def __init__(self, loaders: list[Any]) -> None:
        self._shared = any(_hands_out_its_own(loader) for loader in loaders)
        self._recent: deque[deque[_Part]] = deque()
        self._lasting: list[_Part] = []

    def watch(self, fetcher: Any) -> None:
        """Keep each batch that a fetcher of Lightning's gives, from those that it holds already on.

        Args:
            fetcher: has begun its loop, and belongs to it until that ends.
        """
        if self._shared:
            for batch in getattr(fetcher, "batches", ()):
                self._keep(batch)
            fetcher.iterator = map(self._keep, fetcher.iterator)

    def _keep(self, batch: Any) -> Any:
        self._recent.append(_parts_of(batch))
        if len(self._recent) > _IN_USE:
            parts = self._recent.popleft()
            while parts:  # one by one: what only an outer object holds goes with it
                part = parts.popleft()
                if part.may_matter():
                    self._lasting.append(part)
        return batch

    def put_back(self) -> None:
        """Contents as they were, in the same objects; the first that was kept of an object counts."""
        with torch.inference_mode(False), torch.no_grad():
            for part in reversed([*self._lasting, *chain.from_iterable(self._recent)]):
                part.put_back()
        self._lasting, self._recent = [], deque()


# Lightning holds so many batches at once: that of the step, that before it, and one that it fetches ahead.
_IN_USE = 3


class _Part:
    """The state of an object in a batch, and whether anything but the loop and this holds the object.

    Args:
        value: the object.
        state: of it.
        references: how many the state holds to the object.
        users: how many tensors of the state use the memory of a tensor.
    """

    def __init__(self, value: Any, state: State, references: int, users: int) -> None:
        self._value, self._references, self._users = value, references, users
        self._restore, self._changed = state.restore, state.changed

    def put_back(self) -> None:
        """The state of the object, unless it has that still: its memory may be read-only."""
        if self._changed is None or self._changed():
            self._restore()

    def references(self) -> int:
        """To the object, with those of this part."""
        return sys.getrefcount(self._value)

    def may_matter(self) -> bool:
        """Whether the object may be read again, and may not hold what it held."""
        if self._changed is not None and not self._changed():
            return False
        if self.references() > self._references + _ALONE or isinstance(self._value, np.ndarray):
            return True
        if isinstance(self._value, Tensor):
            if self._value.layout != torch.strided:
                return False
            return not _is_plain_tensor(self._value) or _storage_users(self._value) > self._users + _UNSHARED
        return False


def _parts_of(batch: Any) -> deque[_Part]:
    """Of everything in a batch that has a state, outer objects before those that they hold.

    Datasets, dataloaders and modules that it holds are left out with all below: they are no part of its content, and to
    walk over them for each batch would take long. A batch that is one itself is not.
    """
    found, seen, pending = deque[_Part](), dict[int, Any](), deque([batch])
    with torch.inference_mode(False), torch.no_grad():
        while pending:
            value = pending.popleft()
            if type(value) in CONSTANT_TYPES or id(value) in seen:
                continue
            if value is batch or not isinstance(value, Dataset | DataLoader | nn.Module):
                seen[id(value)] = value
                found.extend(_part_of(value, pending))
    return found


def _part_of(value: Any, pending: deque[Any]) -> Iterator[_Part]:
    """One part, if the object has a state; what hangs on it goes to ``pending``."""
    references, users = sys.getrefcount(value), _storage_users(value)
    if (state := state_of(value, weights=True)) is not None:
        references, users = sys.getrefcount(value) - references, _storage_users(value) - users
        pending.extend(part for _, part in state.parts)
        yield _Part(value, state, references, users)


def _is_plain_tensor(value: Any) -> bool:
    """Whether memory tells who else holds it: not that of NumPy, and not that of a layout or a class of its own."""
    return (
        type(value) is Tensor
        and value.layout == torch.strided
        and not (value.is_nested or value.is_meta)
        and value.untyped_storage().resizable()
    )


def _storage_users(value: Any) -> int:
    return _count_users(value.untyped_storage()._cdata) if _count_users and _is_plain_tensor(value) else 0


def _hands_out_its_own(loader: Any) -> bool:
    return not isinstance(loader, DataLoader) or (loader.num_workers == 0 and loader.collate_fn is not default_collate)


# A part of torch that is not public: where it is missing, everything that was changed is kept.
_count_users = getattr(torch._C, "_storage_Use_Count", None)

# What an object counts that nothing else refers to, and the storage of a tensor that has it for itself.
_ALONE = _Part(object(), State(lambda: None), 0, 0).references()
_UNSHARED = _storage_users(torch.empty(1, device="cpu")) if _count_users else -1
