"""What depends on several processes: writing on rank 0, agreeing on failures, which strategies work."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import torch.distributed as dist
from torch.distributed import distributed_c10d

from tinyq_lightning.errors import CheckpointError, TinyQError, TrainerError, quoted
from tinyq_lightning.namespaces import namespace_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "JoinedDDPStrategy",
    "NotHeardError",
    "agreed_on_failure",
    "as_tinyq_error",
    "is_sharded",
    "refuse_sharding",
    "write_on_rank_zero",
]


_T = TypeVar("_T")


def write_on_rank_zero(trainer: Trainer, write: Callable[[], _T]) -> _T | None:
    """Call ``write`` on rank 0 only; if it raises, raise on every rank.

    Returns:
        What it returned on rank 0, None on the others.

    Raises:
        TinyQError: on every rank, if ``write`` raised one; a CheckpointError if it raised another exception.
    """
    failure: tuple[type[TinyQError], str] | None = None
    cause: Exception | None = None
    made: _T | None = None
    if trainer.is_global_zero:
        try:
            made = write()
        except Exception as error:
            cause = error
            failure = as_tinyq_error(error, CheckpointError)
    failure = trainer.strategy.broadcast(failure)
    if failure is not None:
        kind, text = failure
        raise kind(text) from cause
    return made


def as_tinyq_error(error: Exception, other: type[TinyQError] = TinyQError) -> tuple[type[TinyQError], str]:
    """Type and text of an error as a TinyQError; ``other`` is the type for exceptions of other packages."""
    if isinstance(error, TinyQError):
        return type(error), str(error)
    return other, quoted(error)


PATIENCE = timedelta(seconds=30)
"""How long a rank that failed waits to be heard by the others, where it cannot interrupt what they wait for."""


class NotHeardError(TinyQError):
    """A rank failed while others wait in a collective that cannot be interrupted, or a rank has ended.

    Every process must end.
    """


@contextmanager
def agreed_on_failure(trainer: Trainer) -> Iterator[None]:
    """If the block raises on any rank, raise on every rank, with the reason of the rank that failed first.

    A rank that fails must not leave the others waiting in a collective, be it ours or one of the user's loop.
    So with gloo the block has a process group of its own. A failing rank closes it, which interrupts
    the collectives of the other ranks; the group of the run remains usable. Other backends have no such way to
    interrupt a collective: there a failing rank waits for the others for a while, and then has the run end.

    With gloo, a rank that ends, because it is killed or raises a BaseException such as SystemExit, ends the others.

    Raises:
        NotHeardError: on the rank that failed, if the others do not hear of it; Lightning or what launched the
            processes then ends them all. On the others, if a rank has ended or, with gloo, does not answer.
        TinyQError: on a rank that did not fail first: the same kind of error, with the rank that did.
        Exception: on the rank that failed first, whatever the block raised.
    """
    if trainer.world_size == 1 or not dist.is_initialized():
        yield
        return
    own: Exception | None = None
    order = 0
    group = _ClosableGroup() if _can_be_closed() else _Group()
    try:
        yield
    except NotHeardError:  # of a block inside this one
        group.close()
        raise
    except Exception as error:
        own, order = error, group.count_failure()
        group.close()
    except BaseException as error:
        group.leave()  # the other ranks read the store of the former group
        group.tell_of_end(error)
        group.close()
        raise
    group.leave()
    everyone = group.told_by_all(None if own is None else (order, as_tinyq_error(own)))
    group.close()  # not earlier: another rank may have been in a last collective of the block
    failed = [(told[0], rank, *told[1]) for rank, told in enumerate(everyone) if told is not None]
    if not failed:
        return
    _, rank, kind, text = min(failed, key=lambda each: each[:2])
    if own is not None and rank == trainer.global_rank:
        raise own
    raise kind(text) from own


Failure: TypeAlias = "tuple[int, tuple[type[TinyQError], str]] | None"

_blocks = itertools.count()


def _can_be_closed() -> bool:
    return dist.get_backend() == dist.Backend.GLOO


class _Group:
    """The default process group; the ranks tell one another of failures by the store, not by collectives."""

    def __init__(self) -> None:
        self._key = f"tinyq-failures-{next(_blocks)}"  # the ranks enter the same blocks
        self._keys = [f"{self._key}-{rank}" for rank in range(dist.get_world_size())]

    def count_failure(self) -> int:
        """How many ranks have failed: a rank counts before it closes its group, which makes the others fail."""
        try:
            return int(_store().add(self._key, 1))
        except RuntimeError:  # the rank that keeps the store has ended
            return dist.get_world_size()

    def tell_of_end(self, error: BaseException) -> None:
        """Tell that this process ends, and why, for the others to end too."""
        if isinstance(error.__context__, KeyboardInterrupt):  # of which Lightning makes a SystemExit
            error = error.__context__
        text = f"rank {dist.get_rank()} has ended: {quoted(error)}"
        with suppress(RuntimeError):
            _store().set(self._keys[dist.get_rank()], pickle.dumps((0, (NotHeardError, text))))

    def told_by_all(self, told: Failure) -> list[Failure]:
        """What each rank tells.

        Raises:
            NotHeardError: this rank has failed and another has not come to the end of its block in time, or the other
                way round.
        """
        reason = "another rank has ended" if told is None else told[1][1]
        try:
            _store().set(self._keys[dist.get_rank()], pickle.dumps(told))
            _store().wait(self._keys, timedelta(days=7) if told is None else PATIENCE)
            over = _store().check([f"{self._key}-over"])
            everyone = [pickle.loads(_store().get(key)) for key in self._keys]
        except RuntimeError as error:
            with suppress(RuntimeError):
                _store().set(f"{self._key}-over", "")
            raise NotHeardError(
                f"rank {dist.get_rank()} cannot tell the others of a failure: they have ended, or for "
                f"{PATIENCE.seconds} s have waited for it in what {dist.get_backend()} cannot interrupt. So it ends "
                f"too: {reason}"
            ) from error
        if over:
            raise NotHeardError(
                f"another rank waited in vain for rank {dist.get_rank()} to hear of a failure, and ended"
            )
        return everyone

    def leave(self) -> None:
        """Make the former group the default again."""

    def close(self) -> None:
        """Close the connections of the group, which ends the collectives of other ranks with an error."""


class _ClosableGroup(_Group):
    """A group of gloo that is the default while it is entered, and that a failing rank can close.

    Raises:
        RuntimeError: a rank has failed before, so the group cannot be made.
    """

    def __init__(self) -> None:
        super().__init__()
        self._former = cast("dist.ProcessGroup", dist.group.WORLD)
        dist.barrier()  # fails if a rank has failed before; making a group would wait for that rank
        self._group: dist.ProcessGroup | None = dist.new_group()
        distributed_c10d._update_default_pg(self._group)

    def told_by_all(self, told: Failure) -> list[Failure]:
        """What each rank tells, by the former group.

        Raises:
            NotHeardError: a rank has ended, or does not answer in the time that gloo waits.
        """
        everyone: list[Failure] = [None] * dist.get_world_size()
        try:
            dist.all_gather_object(everyone, told)
        except RuntimeError as error:
            seen = "" if told is None else f": {told[1][1]}"
            raise NotHeardError(f"{self._who_ended(error)}, so this process ends too{seen}") from error
        return everyone

    def _who_ended(self, error: RuntimeError) -> str:
        """What ranks have left in the store about their end; else ``error``, of what waited for them."""
        with suppress(RuntimeError):  # the rank that keeps it has ended
            for key in self._keys:
                if _store().check([key]):
                    return str(pickle.loads(_store().get(key))[1][1])
        return f"another process does not answer ({str(error).strip()})"

    def leave(self) -> None:
        distributed_c10d._update_default_pg(self._former)

    def close(self) -> None:
        self.leave()
        if self._group is not None:
            with suppress(RuntimeError, ValueError):  # another rank has closed it
                dist.destroy_process_group(self._group)
            self._group = None


def _store() -> Any:
    """By which the processes found one another."""
    return distributed_c10d._get_default_store()


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
            "convert_zero_checkpoint_to_fp32_state_dict makes. To measure both as well, of a file: "
            "Trainer(devices=1, callbacks=[TinyQCallback(..., when='test_start')]).test(model, ckpt_path=FILE)"
        )


class JoinedDDPStrategy:
    """DDP that uses the existing processes and process group instead of launching new ones."""

    derives = "strategies.DDPStrategy"

    def _configure_launcher(self) -> None:
        self._launcher = None
