"""A silent second Trainer that runs a loop of the user's, and answers the module as the user's own Trainer would."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch

from tinyq_lightning.namespaces import NAMESPACES, OF_LIGHTNING, derives_from, namespace_of
from tinyq_lightning.trainer.ranks import JoinedDDPStrategy
from tinyq_lightning.trainer.state import is_ours, package_of

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning.pytorch.strategies import Strategy
else:
    DummyLogger = Trainer = object

__all__ = [
    "Moment",
    "Stage",
    "changes_batches",
    "do_nothing",
    "inner_trainer",
    "nothing_saved",
    "quiet",
    "shadowed",
    "state_roots",
]

Stage = Literal["validate", "test"]

_PREFIX = {"validate": "on_validation", "test": "on_test"}

_MISSING = object()


class Moment(NamedTuple):
    """A moment of a fit.

    Attributes:
        epoch: what ``current_epoch`` was.
        step: what ``global_step`` was.
    """

    epoch: int
    step: int


def inner_trainer(
    trainer: Trainer,
    watch: Callback,
    stage: Stage,
    batches: int | None,
    moment: Moment | None,
    attributes: Mapping[str, Any] | None = None,
) -> Trainer:
    """A Trainer that runs a loop of ``trainer`` again: same precision, limits, processes; nothing written or shown.

    What a module may ask its Trainer for is that of the user's: epochs, optimizers, loggers' names and folders,
    settings, attributes of the user's own. Callbacks that change the batches run; the others are there, but without
    hooks.

    Args:
        trainer: the user's.
        watch: a callback of ours.
        stage: which loop.
        batches: at most so many of each dataloader; None: as many as the user's Trainer takes.
        moment: the epoch and step that it tells; None: those of the user's Trainer.
        attributes: of the user's Trainer, of which those of the user's own are taken; None: as they are now.
    """
    limit_name = "limit_val_batches" if stage == "validate" else "limit_test_batches"
    limit = getattr(trainer, limit_name)
    if batches is not None:
        limit = min(limit, batches) if isinstance(limit, int) else batches
    strategy: Strategy | str = "auto"
    devices: Any = trainer.num_devices if trainer.strategy.root_device.type == "cpu" else trainer.device_ids
    lightning = namespace_of(trainer)
    if isinstance(trainer.strategy, lightning.pytorch.strategies.DDPStrategy):
        strategy = lightning.derived(JoinedDDPStrategy)(
            cluster_environment=trainer.strategy.cluster_environment,
            process_group_backend=trainer.strategy.process_group_backend,
        )
    with quiet(), _without_settings_of_the_environment():
        inner: Trainer = lightning.derived(_SilentTrainer)(
            accelerator=trainer.accelerator,
            devices=devices,
            num_nodes=trainer.num_nodes,
            strategy=strategy,
            plugins=[trainer.precision_plugin],
            logger=[lightning.derived(_SilentLogger)(logger) for logger in trainer.loggers],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            # states and caches made under it could not be trained past
            inference_mode=stage == "test" and trainer.test_loop.inference_mode,
            use_distributed_sampler=False,  # the loaders have theirs already
            default_root_dir=trainer.default_root_dir,
        )
    vars(inner).update(outer=trainer, moment=moment)
    present = dict(vars(trainer))
    settings = {name: value for name, value in present.items() if type(value) in (bool, int, float, str, type(None))}
    own = {name: value for name, value in (attributes or present).items() if name not in vars(inner)}
    vars(inner).update({name: value for name, value in settings.items() if name in vars(inner)} | own)
    setattr(inner, limit_name, limit)
    for name in ("_optimizers", "_lightning_optimizers", "lr_scheduler_configs"):
        setattr(inner.strategy, name, getattr(trainer.strategy, name))
    inner.callbacks = list(_callbacks(trainer, stage, watch))  # type: ignore[attr-defined]
    return inner


class _SilentTrainer(Trainer):
    """Says of a run what the user's Trainer says, or said at a moment: which it is, its files, how far it has come."""

    derives = "Trainer"
    outer: Trainer
    moment: Moment | None

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        self.fit_loop = self.outer.fit_loop  # only now: attaching data to a Trainer empties its loops
        return super()._run(*args, **kwargs)

    def _run_stage(self) -> Any:
        """What a fit validates again is told that it is a fit; Lightning itself must know which loop runs."""
        fn, loop = self.state.fn, self._evaluation_loop
        begin = loop.on_run_start

        def on_run_start(*args: Any, **kwargs: Any) -> None:
            if self.outer.state.fn == "fit":
                self.state.fn = self.outer.state.fn
            begin(*args, **kwargs)

        try:
            with shadowed([(loop, {"on_run_start": on_run_start})]):
                return super()._run_stage()
        finally:
            self.state.fn = fn

    @property
    def _evaluation_loop(self) -> Any:
        """The loop that runs, where Lightning goes by which run the Trainer says it is."""
        return self.test_loop if self.testing else self.validate_loop

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is saved: the file that the user's hooks name holds what the fit gave."""

    @property
    def log_dir(self) -> str | None:
        return self.outer.log_dir

    @property
    def current_epoch(self) -> int:
        return self.moment.epoch if self.moment else super().current_epoch

    @property
    def global_step(self) -> int:
        return self.moment.step if self.moment else super().global_step


class _SilentLogger(DummyLogger):
    """Takes what the user's hooks log and drops it, but has the name, version and folders of a logger of theirs."""

    derives = "loggers.logger.DummyLogger"

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger

    @property
    def name(self) -> str | None:  # type: ignore[override]
        return self._logger.name

    @property
    def version(self) -> int | str | None:  # type: ignore[override]
        return self._logger.version

    @property
    def root_dir(self) -> str | None:
        return self._logger.root_dir

    @property
    def log_dir(self) -> str | None:
        return self._logger.log_dir

    @property
    def save_dir(self) -> str | None:
        return self._logger.save_dir

    def __getattr__(self, name: str) -> Any:
        """Plain values are those of the user's logger; methods do nothing."""
        if name.startswith("_"):
            raise AttributeError(name)
        value = getattr(self._logger, name)
        return value if isinstance(value, str | int | float | os.PathLike) or value is None else do_nothing


def state_roots(trainer: Trainer, module: LightningModule) -> list[object]:
    """What an evaluation may change: the module, its data module, optimizers, schedulers, what is on the Trainer."""
    schedulers = [config.scheduler for config in trainer.strategy.lr_scheduler_configs]
    return [*vars(trainer).values(), *trainer.strategy.optimizers, *schedulers, module]


def _callbacks(trainer: Trainer, stage: Stage, watch: Callback) -> Iterator[Callback]:
    """Copies of the user's callbacks, with the hooks of the loop if they change batches, else without any.

    ``watch`` is where the first callback of ours is, so that it sees the batches that this one sees.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    known = vars(namespace_of(trainer).pytorch.Callback)
    hooks = [name for name in known if name.startswith("on_") or name in ("setup", "teardown")]
    ours = [index for index, callback in enumerate(callbacks) if is_ours(type(callback))]
    for index, callback in enumerate(callbacks):
        if index == min(ours, default=0):
            yield watch
        kept = _PREFIX[stage] if changes_batches(callback, stage) else "no hook"
        muted = {name: do_nothing for name in hooks if not name.startswith(kept)}
        name = type(callback).__name__
        local = {"__qualname__": f"_callbacks.<locals>.{name}"}  # else LightningCLI finds two classes of the name
        with suppress(TypeError):  # a class that cannot be derived from
            bases = (type(callback), *_silent(type(callback), hooks))
            copied: Any = object.__new__(type(name, bases, muted | local))
            vars(copied).update({name: value for name, value in vars(callback).items() if name not in muted})
            yield cast("Callback", copied)


def _silent(kind: type, hooks: Iterable[str]) -> Iterator[type]:
    """Of a user's class that derives from one of ours: a base whose hooks do nothing, which ``super()`` finds first."""
    of_ours = next((base for base in kind.__mro__ if package_of(base) == "tinyq_lightning"), kind)
    if of_ours is not kind:
        yield type(of_ours.__name__, (of_ours,), dict.fromkeys(hooks, do_nothing))


def changes_batches(callback: Callback, stage: Stage) -> bool:
    """Whether it is a callback of the user's with a hook before each batch."""
    hook = f"{_PREFIX[stage]}_batch_start"
    definer = next((kind for kind in type(callback).__mro__ if hook in vars(kind)), None)
    return (
        package_of(definer) not in ("lightning", "pytorch_lightning", "tinyq_lightning")
        and definer is not None
        and not derives_from(type(callback), "Checkpoint", "EarlyStopping", "ProgressBar")
    )


def do_nothing(*args: Any, **kwargs: Any) -> None:
    """What stands for a hook or a method that must not run."""


@contextmanager
def _without_settings_of_the_environment() -> Iterator[None]:
    """Without the variables ``PL_TRAINER_*``, which set arguments of every Trainer."""
    names = [name for name in os.environ if name.startswith("PL_TRAINER_")]
    kept = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(kept)


@contextmanager
def shadowed(shadows: Iterable[tuple[Any, dict[str, Any]]]) -> Iterator[None]:
    """Set attributes on instances inside the block, over those of their class."""
    shadows = list(shadows)
    before = [(owner, {name: vars(owner).get(name, _MISSING) for name in names}) for owner, names in shadows]
    for owner, names in shadows:
        vars(owner).update(names)
    try:
        yield
    finally:
        for owner, names in before:
            for name, value in names.items():
                if value is _MISSING:
                    vars(owner).pop(name, None)
                else:
                    vars(owner)[name] = value


@contextmanager
def nothing_saved() -> Iterator[None]:
    """No weights are written to disk inside the block, by ``torch.save`` or safetensors.

    Hooks of the user's that keep the best weights in files would put quantized ones there.
    """
    writers = [(torch, "save"), (sys.modules.get("safetensors.torch"), "save_file")]
    present = [(owner, name) for owner, name in writers if owner is not None]
    with shadowed((owner, {name: _unless_to_path(getattr(owner, name))}) for owner, name in present):
        yield


def _unless_to_path(save: Callable[..., Any]) -> Callable[..., Any]:
    """The function, except that it does nothing where the second argument is a path."""

    @functools.wraps(save)
    def saved(*args: Any, **kwargs: Any) -> Any:
        target = args[1] if len(args) > 1 else kwargs.get("f", kwargs.get("filename"))
        return None if isinstance(target, str | os.PathLike) else save(*args, **kwargs)

    return saved


def _advice() -> list[type[Warning]]:
    """The class of Lightning's advice on settings, of each package that is imported."""
    modules = (sys.modules.get(f"{each.fabric_name}.utilities.warnings") for each in NAMESPACES)
    return [module.PossibleUserWarning for module in modules if module is not None]


@contextmanager
def quiet() -> Iterator[None]:
    """No notes of the second Trainer's on hardware, loggers and workers: the user has read them once."""
    roots = [*(name for each in NAMESPACES for name in (each.name, each.fabric_name)), "lightning_utilities"]
    below = tuple(f"{root}." for root in roots)
    loggers = [logging.getLogger(name) for name in roots]
    known = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith(below)]
    loggers += [logger for logger in known if logger.level]  # the others take the level of these
    levels = [(logger, logger.level) for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            for category in _advice():
                warnings.filterwarnings("ignore", category=category)
            warnings.filterwarnings("ignore", module=rf"{OF_LIGHTNING}|tinyq_lightning\.trainer")
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)
