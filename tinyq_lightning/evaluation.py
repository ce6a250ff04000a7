"""The user's own validation loop, run once more on whatever weights the module holds."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.deepspeed import DeepSpeedStrategy
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from tinyq_lightning.errors import EvaluationError, TrainerError
from tinyq_lightning.isolation import rewound_randomness
from tinyq_lightning.validation_watch import ValidationWatch

__all__ = [
    "Results",
    "Validation",
    "compare",
    "numbers",
    "refuse_sharding",
    "run_validation",
    "why_never_validated",
    "why_no_validation",
]

Results = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Validation:
    """What one run of the validation loop gave.

    Attributes:
        metrics: every logged metric by its name.
        higher_is_better: by metric, where the logged torchmetrics object tells.
        seconds_per_batch: median over the batches.
    """

    metrics: dict[str, float]
    higher_is_better: dict[str, bool]
    seconds_per_batch: float


# Set up once, for the fit; a second time they would rebuild the layers or the data under evaluation.
_SETUP_HOOKS = ("prepare_data", "setup", "teardown", "configure_model", "configure_callbacks")
_DATA_SETUP_HOOKS = ("prepare_data", "setup", "teardown")


def refuse_sharding(trainer: Trainer) -> None:
    """Refuse strategies under which no process holds the whole model.

    Raises:
        TrainerError: the strategy is neither single-device nor DDP, or of the other package.
    """
    if not isinstance(trainer, Trainer):
        raise TrainerError(
            f"TinyQCallback works with lightning.pytorch, and this is the Trainer of {type(trainer).__module__}: "
            "import Trainer and LightningModule from lightning.pytorch"
        )
    strategy = trainer.strategy
    whole = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
    if not whole:
        raise TrainerError(
            f"TinyQCallback does not work with {type(strategy).__name__}: it may shard the model, and quantizing needs "
            "each layer whole. Train without the callback, then quantize the consolidated checkpoint: "
            "Trainer(devices=1, callbacks=[TinyQCallback(..., when='test_start')]).test(model, ckpt_path=...)"
        )


def why_never_validated(trainer: Trainer, module: LightningModule) -> str | None:
    """What can be said of :func:`why_no_validation` before there are dataloaders."""
    if not is_overridden("validation_step", module):
        return f"{type(module).__name__} has no validation_step"
    if trainer.limit_val_batches == 0:
        return "limit_val_batches is 0"
    return None


def why_no_validation(trainer: Trainer, module: LightningModule) -> str | None:
    """Why the user's validation loop cannot be run, or None where it can."""
    if why_not := why_never_validated(trainer, module):
        return why_not
    if not _loaders(trainer):
        return "there is no validation dataloader, or it is empty"
    return None


def run_validation(trainer: Trainer, module: LightningModule, batches: int | None = None) -> Validation:
    """What the user's validation loop logs on the weights that ``module`` holds now.

    A second, silent Trainer runs it over the dataloaders of the first: same batches, same limits, same
    precision, same processes. The random state is put back afterwards, so a run that follows draws the
    same. Attributes of the module are not put back: wrap this in ``preserved``.

    Args:
        trainer: the user's, at the end of a fit.
        module: the user's.
        batches: at most so many of each dataloader; None: as many as the user's Trainer takes.

    Returns:
        What was logged, and how long it took; the same on every process, for them to decide alike.

    Raises:
        EvaluationError: the loop failed.
    """
    loaders = trainer.val_dataloaders
    watch = ValidationWatch()
    inner = _silent_trainer(trainer, watch, batches)
    data: dict[str, Any] = {"dataloaders": loaders}
    shadows: list[tuple[Any, dict[str, Any]]] = [(module, dict.fromkeys(_SETUP_HOOKS, _nothing))]
    if (datamodule := _datamodule(trainer)) is not None:  # for its transfer hooks, and for `self.trainer.datamodule`
        data = {"datamodule": datamodule}
        hooks = dict.fromkeys(_DATA_SETUP_HOOKS, _nothing)
        shadows.append((datamodule, {**hooks, "val_dataloader": lambda: loaders, "trainer": inner}))
    with rewound_randomness(_loaders(trainer)), _shadowed(shadows), _quiet():
        try:
            inner.validate(module, verbose=False, **data)
        except Exception as error:
            raise EvaluationError(
                f"the validation loop of {type(module).__name__} failed when it was run again for the comparison: "
                f"{type(error).__name__}: {error}"
            ) from error
    result = Validation(numbers(inner.callback_metrics), watch.higher_is_better, watch.seconds_per_batch)
    return trainer.strategy.broadcast(result)


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Logged metrics as plain floats, ours left out."""
    plain = {
        name: value.item() if isinstance(value, Tensor) else value
        for name, value in metrics.items()
        if not name.startswith("tinyq/") and (not isinstance(value, Tensor) or value.numel() == 1)
    }
    return {name: float(value) for name, value in plain.items() if isinstance(value, int | float)}


def compare(before: Mapping[str, float], after: Mapping[str, float], label: str) -> Results:
    """``{metric: {"float": …, label: …, "delta": …}}`` for each metric that both runs logged."""
    return {
        name: {"float": before[name], label: after[name], "delta": _difference(after[name], before[name])}
        for name in before
        if name in after
    }


def _difference(after: float, before: float) -> float:
    return 0.0 if after == before else after - before if math.isfinite(before) else math.nan


def _datamodule(trainer: Trainer) -> LightningDataModule | None:
    return cast("LightningDataModule | None", trainer.datamodule)  # type: ignore[attr-defined]


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _loaders(trainer: Trainer) -> list[Any]:
    """The validation dataloaders one by one; those of a fit that never validated are asked for here."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if trainer.val_dataloaders is None and loop._data_source.is_defined():
        with _quiet():
            loop.setup_data()
    loaders = trainer.val_dataloaders
    return [] if loaders is None else list(CombinedLoader(loaders, "sequential").flattened)


class _SilentLogger(DummyLogger):
    """Takes what the user's hooks log and drops it, but knows where the user's logger keeps its files."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self._log_dir = trainer.log_dir
        self._save_dir = trainer.logger.save_dir if trainer.logger else trainer.default_root_dir

    @property
    def log_dir(self) -> str | None:
        return self._log_dir

    @property
    def save_dir(self) -> str | None:
        return self._save_dir


class _JoinedDDPStrategy(DDPStrategy):
    """DDP among the processes that are there already."""

    def _configure_launcher(self) -> None:
        self._launcher = None


def _silent_trainer(trainer: Trainer, watch: ValidationWatch, batches: int | None) -> Trainer:
    limit = trainer.limit_val_batches
    if batches is not None:
        limit = min(limit, batches) if isinstance(limit, int) else batches
    strategy: Strategy | str = "auto"
    devices: Any = trainer.num_devices if trainer.strategy.root_device.type == "cpu" else trainer.device_ids
    if isinstance(trainer.strategy, DDPStrategy):
        strategy = _JoinedDDPStrategy(
            cluster_environment=trainer.strategy.cluster_environment,
            process_group_backend=trainer.strategy.process_group_backend,
        )
    with _quiet():
        inner = Trainer(
            accelerator=trainer.accelerator,
            devices=devices,
            num_nodes=trainer.num_nodes,
            strategy=strategy,
            plugins=[trainer.precision_plugin],
            limit_val_batches=limit,
            logger=_SilentLogger(trainer),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            inference_mode=False,  # states and caches made under it could not be trained past
            use_distributed_sampler=False,  # the loaders have theirs already
            default_root_dir=trainer.default_root_dir,
        )
    inner.callbacks = [watch]  # type: ignore[attr-defined]  # packages may register some for every Trainer
    # what `self.current_epoch` and `self.global_step` say inside the user's hooks
    inner.fit_loop.epoch_progress = trainer.fit_loop.epoch_progress
    theirs, ours = trainer.fit_loop.epoch_loop, inner.fit_loop.epoch_loop
    ours.automatic_optimization.optim_progress = theirs.automatic_optimization.optim_progress
    ours.manual_optimization.optim_step_progress = theirs.manual_optimization.optim_step_progress
    return inner


@contextmanager
def _shadowed(shadows: Iterable[tuple[Any, dict[str, Any]]]) -> Iterator[None]:
    """Set attributes on instances inside the block, over those of their class."""
    before = [(owner, {name: vars(owner).get(name, _nothing) for name in names}) for owner, names in shadows]
    for owner, names in shadows:
        vars(owner).update(names)
    try:
        yield
    finally:
        for owner, names in before:
            for name, value in names.items():
                if value is _nothing:
                    with suppress(KeyError):
                        del vars(owner)[name]
                else:
                    vars(owner)[name] = value


@contextmanager
def _quiet() -> Iterator[None]:
    """No notes of the second Trainer's on hardware, loggers and workers: the user has read them once."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning_utilities")]
    loggers += [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith("lightning.")]
    levels = [(logger, logger.level) for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=PossibleUserWarning)
            warnings.filterwarnings("ignore", module=r"lightning\.|tinyq_lightning\.evaluation")
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)
