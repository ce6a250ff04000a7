"""What depends on several processes: writing on rank 0, which strategies work, a second Trainer in the same group."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.deepspeed import DeepSpeedStrategy

from tinyq_lightning.errors import CheckpointError, TrainerError

__all__ = [
    "JoinedDDPStrategy",
    "refuse_sharding",
    "write_on_rank_zero",
]


def write_on_rank_zero(trainer: Trainer, write: Callable[[], object]) -> None:
    """Call ``write`` on rank 0 only; if it raises CheckpointError, raise it on every rank.

    Raises:
        CheckpointError: on every rank, if ``write`` raised one.
    """
    failure: str | None = None
    if trainer.is_global_zero:
        try:
            write()
        except CheckpointError as error:
            failure = str(error)
    failure = trainer.strategy.broadcast(failure)
    if failure is not None:
        raise CheckpointError(failure)


def refuse_sharding(trainer: Trainer) -> None:
    """Refuse strategies under which no process holds the whole model.

    Raises:
        TrainerError: the strategy is neither single-device nor DDP, or the Trainer is of ``pytorch_lightning``.
    """
    if not isinstance(trainer, Trainer):
        raise TrainerError(
            f"TinyQCallback works with lightning.pytorch, and this is the Trainer of {type(trainer).__module__}: "
            "import Trainer and LightningModule from lightning.pytorch"
        )
    strategy = trainer.strategy
    unsharded = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
    if not unsharded:
        raise TrainerError(
            f"TinyQCallback does not work with {type(strategy).__name__}: it may shard the model, and quantizing needs "
            "each layer whole. Train without the callback, then quantize the consolidated checkpoint: "
            "Trainer(devices=1, callbacks=[TinyQCallback(..., when='test_start')]).test(model, ckpt_path=...)"
        )


class JoinedDDPStrategy(DDPStrategy):
    """DDP that uses the existing processes and process group instead of launching new ones."""

    def _configure_launcher(self) -> None:
        self._launcher = None
