"""What a batch holds: a digest that tells two batches apart, and its content for the next reader."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from tinyq_lightning.trainer.isolation import Snapshot

__all__ = [
    "KeptBatch",
    "batch_digest",
]

# So many values of each tensor and so many tensors of a batch go into its digest.
_SAMPLES, _LEAVES = 32, 1024


def batch_digest(batch: Any) -> int:
    """A number that two batches share if they hold the same; from some values of each tensor, array, number, text."""
    digest = 0
    for index, leaf in enumerate(_leaves(batch)):
        if index == _LEAVES:
            break
        digest = zlib.crc32(_bytes_of(leaf), digest)
    return digest


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, Tensor | np.ndarray | int | float | str | bytes):
        yield value
    elif hasattr(value, "__dict__"):
        for item in vars(value).values():
            if isinstance(item, Tensor | np.ndarray | int | float | str | Mapping | list | tuple):
                yield from _leaves(item)


def _bytes_of(leaf: Any) -> bytes:
    if isinstance(leaf, Tensor):
        if hasattr(leaf, "to_local"):  # a DTensor: the part that this process holds
            leaf = leaf.to_local()
        if leaf.is_meta or leaf.is_nested or leaf.layout != torch.strided:
            return str(leaf.dtype).encode()
        flat = leaf.detach().flatten()
        return repr((tuple(leaf.shape), flat[:: max(1, flat.numel() // _SAMPLES)].tolist())).encode()
    if isinstance(leaf, np.ndarray):
        values = leaf.ravel()
        return repr((leaf.shape, values[:: max(1, values.size // _SAMPLES)].tolist())).encode()
    return repr(leaf).encode()


class KeptBatch:
    """The content of a batch that may belong to the dataset itself, to be put back when the loop is done with it.

    What torch's own collate function or another process makes is new for each reader, and is not kept.

    Args:
        batch: before any hook or step has it.
        loaders: where it may come from.
    """

    def __init__(self, batch: Any, loaders: list[Any]) -> None:
        shared = any(_hands_out_its_own(loader) for loader in loaders)
        self._snapshot = Snapshot(batch, randomness=False) if shared else None

    def put_back(self) -> None:
        """Content as it was, in the same objects."""
        if self._snapshot is not None:
            self._snapshot.put_back()


def _hands_out_its_own(loader: Any) -> bool:
    return not isinstance(loader, DataLoader) or (loader.num_workers == 0 and loader.collate_fn is not default_collate)
