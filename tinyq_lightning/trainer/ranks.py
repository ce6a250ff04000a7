"""What depends on several processes: writing on rank 0, agreeing on failures, which strategies work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, cast

import torch.distributed as dist
from torch.distributed import distributed_c10d

from tinyq_lightning.errors import CheckpointError, TinyQError, TrainerError
from tinyq_lightning.namespaces import namespace_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "JoinedDDPStrategy",
    "agreed_on_failure",
    "as_tinyq_error",
    "is_sharded",
    "refuse_sharding",
    "write_on_rank_zero",
]


def write_on_rank_zero(trainer: Trainer, write: Callable[[], object]) -> None:
    """Call ``write`` on rank 0 only; if it raises, raise on every rank.

    Raises:
        TinyQError: on every rank, if ``write`` raised one; a CheckpointError if it raised another exception.
    """
    failure: tuple[type[TinyQError], str] | None = None
    cause: Exception | None = None
    if trainer.is_global_zero:
        try:
            write()
        except Exception as error:
            cause = error
            failure = as_tinyq_error(error, CheckpointError)
    failure = trainer.strategy.broadcast(failure)
    if failure is not None:
        kind, text = failure
        raise kind(text) from cause


def as_tinyq_error(error: Exception, other: type[TinyQError] = TinyQError) -> tuple[type[TinyQError], str]:
    """Type and text of an error as a TinyQError; ``other`` is the type for exceptions of other packages."""
    if isinstance(error, TinyQError):
        return type(error), str(error)
    return other, f"{type(error).__name__}: {error}"


@contextmanager
def agreed_on_failure(trainer: Trainer) -> Iterator[None]:
    """If the block raises on any rank, raise on every rank, with the reason of the rank that failed first.

    A rank that fails must not leave the others waiting in a collective, be it ours or one of the user's loop.
    So with gloo the block has a process group of its own. A failing rank closes it, which interrupts
    the collectives of the other ranks; the group of the run remains usable. Other backends have no such way to
    interrupt a collective: there the ranks agree at the end of the block only.

    Raises:
        TinyQError: on a rank that did not fail first: the same kind of error, with the rank that did.
        Exception: on the rank that failed first, whatever the block raised.
    """
    if trainer.world_size == 1 or not dist.is_initialized():
        yield
        return
    own: Exception | None = None
    order = 0
    group = _ClosableGroup()
    try:
        yield
    except Exception as error:
        own, order = error, group.count_failure()
        group.close()
    except BaseException:
        group.close()
        raise
    group.leave()
    told = None if own is None else (order, as_tinyq_error(own))
    everyone: list[tuple[int, tuple[type[TinyQError], str]] | None] = [None] * trainer.world_size
    dist.all_gather_object(everyone, told)
    group.close()  # not earlier: another rank may have been in a last collective of the block
    failed = [(told[0], rank, *told[1]) for rank, told in enumerate(everyone) if told is not None]
    if not failed:
        return
    _, rank, kind, text = min(failed, key=lambda each: each[:2])
    if own is not None and rank == trainer.global_rank:
        raise own
    raise kind(text) from own


class _ClosableGroup:
    """The default process group while it is entered: one that a failing rank can close, with gloo.

    Raises:
        RuntimeError: a rank has failed before, so the group cannot be made.
    """

    def __init__(self) -> None:
        self._former = cast("dist.ProcessGroup", dist.group.WORLD)
        self._group: dist.ProcessGroup | None = None
        if dist.get_backend() == dist.Backend.GLOO:
            dist.barrier()  # fails if a rank has failed before; making a group would wait for that rank
            self._group = dist.new_group()
            self._key = f"tinyq-failures-{self._group.group_name}"
            distributed_c10d._update_default_pg(self._group)

    def count_failure(self) -> int:
        """How many ranks have failed: a rank counts before it closes its group, which makes the others fail."""
        return int(distributed_c10d._get_default_store().add(self._key, 1)) if self._group else 0

    def leave(self) -> None:
        """Make the former group the default again."""
        distributed_c10d._update_default_pg(self._former)

    def close(self) -> None:
        """Close the connections of the group, which ends the collectives of other ranks with an error."""
        self.leave()
        if self._group is not None:
            with suppress(RuntimeError, ValueError):  # another rank has closed it
                dist.destroy_process_group(self._group)
            self._group = None


def is_sharded(trainer: Trainer) -> bool:
    """Whether the strategy shards the model by FSDP2 or tensor parallelism."""
    return isinstance(trainer.strategy, namespace_of(trainer).pytorch.strategies.ModelParallelStrategy)


def refuse_sharding(trainer: Trainer, when: str) -> None:
    """Refuse strategies under which the model cannot be quantized or measured.

    Args:
        trainer: the user's.
        when: ``fit_end`` or ``test_start``; at the end of a fit the model may be sharded by ModelParallelStrategy.

    Raises:
        TrainerError: the strategy is another than those that are known to work.
    """
    strategy, known = trainer.strategy, namespace_of(trainer).pytorch.strategies
    if is_sharded(trainer) and (when == "fit_end" or trainer.state.fn == "fit"):
        return
    unsharded = isinstance(strategy, known.SingleDeviceStrategy | known.DDPStrategy)
    if not unsharded or isinstance(strategy, known.DeepSpeedStrategy):
        raise TrainerError(
            f"TinyQCallback(when={when!r}) does not work with {type(strategy).__name__}: it may shard the model, and "
            "quantizing needs each layer whole. Train without the callback, then quantize the checkpoint: "
            "tinyq-lightning quantize CHECKPOINT --model package.module:Class, where CHECKPOINT is a file, or a folder "
            "of torch.distributed.checkpoint; of DeepSpeed the file that Lightning's "
            "convert_zero_checkpoint_to_fp32_state_dict makes. To measure both as well: "
            "Trainer(devices=1, callbacks=[TinyQCallback(..., when='test_start')]).test(model, ckpt_path=...)"
        )


class JoinedDDPStrategy:
    """DDP that uses the existing processes and process group instead of launching new ones."""

    derives = "strategies.DDPStrategy"

    def _configure_launcher(self) -> None:
        self._launcher = None
