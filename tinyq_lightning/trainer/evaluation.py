"""What a validation loop tells beside its values: which way a metric is better, and how long a batch takes."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities import CombinedLoader

from tinyq_lightning.errors import EvaluationError
from tinyq_lightning.trainer.checks import why_never_validated
from tinyq_lightning.trainer.isolation import rewound_randomness
from tinyq_lightning.trainer.ranks import JoinedDDPStrategy
from tinyq_lightning.trainer.results import numbers

__all__ = [
    "Validation",
    "ValidationWatch",
    "directions",
    "logged_names",
    "run_validation",
    "why_no_validation",
]


def directions(trainer: Trainer) -> dict[str, bool]:
    """Whether higher is better, for each metric that was logged as a torchmetrics object that tells.

    Args:
        trainer: in ``on_validation_end``.
    """
    results = trainer._results
    found: dict[str, bool] = {}
    if results is None:
        return found
    for result in results.values():
        higher = None if result.is_tensor else getattr(result.value, "higher_is_better", None)
        if higher is not None:
            found |= dict.fromkeys(results._forked_name(result, on_step=False), bool(higher))
    return found


def logged_names(trainer: Trainer) -> set[str]:
    """The names of all metrics that validation has logged, in a sanity check with several dataloaders as well.

    Args:
        trainer: in ``on_validation_end``.
    """
    names = set(trainer.callback_metrics)
    if (results := trainer._results) is not None:
        epoch = [result for result in results.values() if result.meta.on_epoch]
        names.update(name for result in epoch for name in results._forked_name(result, on_step=False))
    return names


class ValidationWatch(Callback):
    """Watches one validation loop.

    Attributes:
        higher_is_better: by metric, where the logged torchmetrics object tells.
    """

    def __init__(self) -> None:
        self.higher_is_better: dict[str, bool] = {}
        self._seconds: list[float] = []
        self._began = 0.0

    @property
    def seconds_per_batch(self) -> float:
        """Median over the batches; NaN where there were none."""
        return median(self._seconds) if self._seconds else math.nan

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """The clock starts once the batch is there."""
        self._began = time.perf_counter()

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """The clock stops."""
        self._seconds.append(time.perf_counter() - self._began)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The logged objects are still there."""
        self.higher_is_better = directions(trainer)


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


def _silent_trainer(trainer: Trainer, watch: ValidationWatch, batches: int | None) -> Trainer:
    limit = trainer.limit_val_batches
    if batches is not None:
        limit = min(limit, batches) if isinstance(limit, int) else batches
    strategy: Strategy | str = "auto"
    devices: Any = trainer.num_devices if trainer.strategy.root_device.type == "cpu" else trainer.device_ids
    if isinstance(trainer.strategy, DDPStrategy):
        strategy = JoinedDDPStrategy(
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
