"""Watches one loop of a Trainer: its batches, their time, and what ended it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from tinyq_lightning.errors import EvaluationError
from tinyq_lightning.namespaces import namespace_of
from tinyq_lightning.search import BatchTimes, waiting_for
from tinyq_lightning.trainer.batches import KeptBatches, batch_digest

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

__all__ = [
    "LoopWatch",
]


class LoopWatch:
    """Watches one evaluation loop, batch by batch.

    Args:
        device: that computes; it is waited for before the clock starts and before it stops.

    Attributes:
        digests: of each batch, in their order.
    """

    def __init__(self, device: torch.device) -> None:
        self.digests: list[int] = []
        self._wait = waiting_for(device)
        self._seconds: list[float] = []
        self._began = 0.0
        self._kept: KeptBatches | None = None

    @property
    def seconds_per_batch(self) -> BatchTimes:
        """Median and spread over the batches."""
        return BatchTimes.of(self._seconds)

    def loop_started(self, loop: Any) -> None:
        """Before the first batch is used: from now on, keep what belongs to the dataset.

        Args:
            loop: Lightning's.
        """
        self._kept = KeptBatches(list(loop._combined_loader.flattened))
        self._kept.watch(loop._data_fetcher)

    def batch_started(self, batch: Any) -> None:
        """Before the user's hooks and step: note what the batch holds, and start the clock."""
        self.digests.append(batch_digest(batch))
        self._wait()
        self._began = time.perf_counter()

    def batch_stepped(self) -> None:
        """The step has ended."""
        self._wait()
        self._seconds.append(time.perf_counter() - self._began)

    def batches_ended(self) -> None:
        """All batches are done with: what belongs to the dataset is put back as it was."""
        if self._kept is not None:
            self._kept.put_back()
        self._kept = None

    def refuse_lost_batch(self, module: LightningModule, loop: Any) -> None:
        """Refuse a loop that a StopIteration has ended, which Lightning takes for the end of the data.

        Args:
            module: the user's.
            loop: Lightning's, whose last batch is done with.

        Raises:
            EvaluationError: a step or a hook of a batch began and did not end.
        """
        if (raised_in := _unfinished(loop)) is not None:
            raise EvaluationError(
                f"{type(module).__name__}.{raised_in} raised StopIteration in batch "
                f"{loop.batch_progress.current.completed}, which the loop took for the end of the data. If it calls "
                "next(self.parameters()): a model whose weights are all quantized may have no parameter; take "
                "self.device, and the dtype of the batch or of a buffer"
            )


def _unfinished(loop: Any) -> str | None:
    """What of the last batch's step and hooks did not end, by the counts of Lightning's loop; None if all did."""
    name = "test" if loop.trainer.testing else "validation"
    count, fetcher = loop.batch_progress.current, loop._data_fetcher
    given = fetcher.fetched - len(getattr(fetcher, "batches", ()))
    takes_iterator = namespace_of(loop.trainer).module("loops.fetchers")._DataLoaderIterDataFetcher
    if given > count.ready and not isinstance(fetcher, takes_iterator):
        return "transfer_batch_to_device, or on_before_ or on_after_batch_transfer,"
    if count.ready > count.started:
        return f"on_{name}_batch_start, or that of a callback,"
    if count.started > count.processed:
        return f"{name}_step"
    return f"on_{name}_batch_end, or that of a callback," if count.processed > count.completed else None
