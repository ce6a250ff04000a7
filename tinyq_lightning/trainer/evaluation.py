"""Runs the user's validation or test loop on the weights that a module holds now, and leaves everything as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from tinyq_lightning.errors import EvaluationError, quoted
from tinyq_lightning.namespaces import is_overridden, namespace_of
from tinyq_lightning.search import BatchTimes
from tinyq_lightning.trainer.batches import batch_digest
from tinyq_lightning.trainer.callback_base import CallbackOfBoth
from tinyq_lightning.trainer.checks import why_never_validated
from tinyq_lightning.trainer.inner_trainer import (
    Moment,
    Stage,
    do_nothing,
    inner_trainer,
    nothing_saved,
    quiet,
    shadowed,
    state_roots,
)
from tinyq_lightning.trainer.isolation import Snapshot
from tinyq_lightning.trainer.loop_watch import LoopWatch
from tinyq_lightning.trainer.results import directions, numbers

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.utilities import CombinedLoader

__all__ = [
    "Evaluation",
    "dataloaders",
    "run_evaluation",
    "validation_data_lent",
    "why_no_validation",
]


class _Watch(CallbackOfBoth):
    """The callback of an inner Trainer: times the loop, and keeps an eye on batches and weights."""

    def __init__(
        self,
        module: LightningModule,
        known: Mapping[str, Any],
        logged: Mapping[str, Any],
        cut_short: bool,
        each_batch: Callable[[], object],
        device: torch.device,
    ) -> None:
        self.loop = LoopWatch(device)
        self.higher_is_better: dict[str, bool] = {}
        self.metrics: dict[str, float] = {}
        self.other_weights = False
        self._known, self._logged, self._cut_short, self._each_batch = known, logged, cut_short, each_batch
        self._weights = weights_digest(module)

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        connector = trainer._logger_connector
        connector._callback_metrics.update(self._known)
        connector._logged_metrics.update(self._logged)
        self.loop.loop_started(trainer._evaluation_loop)

    def _batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any, **kw: Any) -> None:
        if not self.loop.digests:
            self.other_weights = weights_digest(pl_module) != self._weights
        self._each_batch()
        self.loop.batch_started(batch)

    def _batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self.loop.batch_stepped()
        if self._cut_short and trainer._results is not None:
            trainer._results.clear()  # a metric of the first batches would be computed, which may not be possible

    def _epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.loop.batches_ended()
        self.loop.refuse_lost_batch(pl_module, trainer._evaluation_loop)
        if self._cut_short:
            raise _EnoughBatchesError

    def _end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.higher_is_better = directions(trainer)
        logged = trainer.callback_metrics
        self.metrics = numbers({name: value for name, value in logged.items() if value is not self._known.get(name)})

    on_validation_start = on_test_start = _start
    on_validation_batch_start = on_test_batch_start = _batch_start
    on_validation_batch_end = on_test_batch_end = _batch_end
    on_validation_epoch_end = on_test_epoch_end = _epoch_end
    on_validation_end = on_test_end = _end


class _EnoughBatchesError(Exception):
    """Ends a loop that runs over the first batches only, before hooks that need all of them."""


@dataclass(frozen=True)
class Evaluation:
    """What one run of a validation or test loop gave.

    Attributes:
        metrics: every logged metric by its name.
        higher_is_better: by metric, where the logged torchmetrics object tells.
        seconds_per_batch: median and spread over the batches.
        digests: of each batch that this process read.
        other_weights: whether the module's hooks put other weights in before the first batch.
    """

    metrics: dict[str, float]
    higher_is_better: dict[str, bool]
    seconds_per_batch: BatchTimes
    digests: tuple[int, ...] = ()
    other_weights: bool = False


# Set up once, for the user's own run; a second time they would rebuild the layers or the data under evaluation.
_SETUP_HOOKS = ("prepare_data", "setup", "teardown", "configure_model", "configure_callbacks")


_DATA_SETUP_HOOKS = ("prepare_data", "setup", "teardown")

_OF_LOADERS = ("_combined_loader", "_max_batches", "_seen_batches_per_dataloader", "_last_val_dl_reload_epoch")


@contextmanager
def validation_data_lent(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Context manager in which validation dataloaders may be asked for that the run has not; then all is as before."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if loop._combined_loader is not None or why_never_validated(trainer, module):
        yield
        return
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    roots = [root for root in state_roots(trainer, module) if root is not callbacks]  # ours have results in the block
    before, former = Snapshot(*roots), {name: vars(loop)[name] for name in _OF_LOADERS}
    try:
        yield
    finally:
        vars(loop).update(former)
        before.put_back()


def why_no_validation(trainer: Trainer, module: LightningModule) -> str | None:
    """Why the user's validation loop cannot be run, or None where it can; in a block of ``validation_data_lent``."""
    if why_not := why_never_validated(trainer, module):
        return why_not
    loop = trainer.fit_loop.epoch_loop.val_loop
    if trainer.val_dataloaders is None and loop._data_source.is_defined():
        with quiet():  # those of a fit that never validated are asked for here
            loop.setup_data()
    if not dataloaders(trainer, "validate"):
        return "there is no validation dataloader, or it is empty"
    return None


def dataloaders(trainer: Trainer, stage: Stage) -> list[Any]:
    """The dataloaders of a loop, one by one."""
    combined = _combined_loader(trainer, stage)
    return [] if combined is None else list(combined.flattened)


def run_evaluation(
    trainer: Trainer,
    module: LightningModule,
    stage: Stage,
    batches: int | None = None,
    start: Snapshot | None = None,
    swap: AbstractContextManager[Any] | None = None,
    moment: Moment | None = None,
    attributes: Mapping[str, Any] | None = None,
    each_batch: Callable[[], object] = do_nothing,
) -> Evaluation:
    """What the user's loop logs on the weights that ``module`` holds now.

    A second, silent Trainer runs it over the dataloaders of the first: same batches, same limits, same precision,
    same processes. Afterwards everything is as it was: attributes of the module, of its data module and of what
    hangs on them, optimizers, random state, the place in the data.

    Args:
        trainer: the user's, at the end of a fit, or at the end of a test epoch.
        module: the user's.
        stage: which loop.
        batches: at most so many of each dataloader, without the hooks that come after the last, and without metrics;
            None: as many as the user's Trainer takes.
        start: begin with this former state instead of the present one.
        swap: what to put in for the loop, a Swap for example; None: as the module is then.
        moment: the epoch and step that the loop is told; None: those of the user's Trainer now.
        attributes: of the user's Trainer, for what the user has put there; None: as they are now.
        each_batch: called before each batch.

    Returns:
        What was logged, and how long it took; the same on every process, for them to decide alike.

    Raises:
        EvaluationError: the loop failed.
    """
    combined = _combined_loader(trainer, stage)
    assert combined is not None
    loaders = combined.iterables  # as the user's method gave them
    if combined._mode != "sequential":
        loaders = namespace_of(trainer).pytorch.utilities.CombinedLoader(combined.iterables, combined._mode)
    known, logged = (trainer.callback_metrics, trainer.logged_metrics) if stage == "validate" else ({}, {})
    watch = _Watch(module, dict(known), dict(logged), batches is not None, each_batch, trainer.strategy.root_device)
    inner = inner_trainer(trainer, watch, stage, batches, moment, attributes)
    data: dict[str, Any] = {"dataloaders": loaders}
    shadows: list[tuple[Any, dict[str, Any]]] = [(module, dict.fromkeys(_SETUP_HOOKS, do_nothing))]
    if (datamodule := _datamodule(trainer)) is not None:  # for its transfer hooks, and for `self.trainer.datamodule`
        data = {"datamodule": datamodule}
        hooks = dict.fromkeys(_DATA_SETUP_HOOKS, do_nothing)
        asked = "val_dataloader" if stage == "validate" else "test_dataloader"
        shadows.append((datamodule, {**hooks, asked: lambda: loaders, "trainer": inner}))
    # hooks that run before the first batch may put other weights in, and the loop may end before those that undo it
    weights = any(is_overridden(f"on_{_NAMES[stage]}{hook}", module) for hook in ("_start", "_epoch_start"))
    with (
        _isolated(trainer, module, stage, weights, start),
        shadowed(shadows),
        swap or nullcontext(),
        quiet(),
        nothing_saved(),
        torch.inference_mode(False),
    ):
        try:
            getattr(inner, stage)(module, verbose=False, **data)
        except _EnoughBatchesError:
            pass
        except EvaluationError:
            raise
        except Exception as error:
            loop = {"validate": "validation", "test": "test"}[stage]
            raise EvaluationError(
                f"the {loop} loop of {type(module).__name__} failed when it was run again for the comparison: "
                f"{quoted(error)}"
            ) from error
        finally:
            watch.loop.batches_ended()
    shared = trainer.strategy.broadcast((watch.metrics, watch.higher_is_better, watch.loop.seconds_per_batch))
    return Evaluation(*shared, tuple(watch.loop.digests), watch.other_weights)


_NAMES = {"validate": "validation", "test": "test"}


@contextmanager
def _isolated(
    trainer: Trainer, module: LightningModule, stage: Stage, weights: bool, start: Snapshot | None
) -> Iterator[None]:
    """Begin with the state ``start``, put everything back after the block, and warn of what cannot be."""
    roots = state_roots(trainer, module)
    snapshot = Snapshot(*roots, data=dataloaders(trainer, stage), weights=weights, also=start, outside=True)
    before = start.changed_outside() if start else []  # by the user's own run, of another model
    moved: list[str] = []  # likewise: an iterator that it has read to its end does not move again
    try:
        if start is not None:
            moved = start.put_back(files=False)
        yield
    finally:
        outside = list(dict.fromkeys([*before, *snapshot.changed_outside()]))
        changed = list(dict.fromkeys([*moved, *snapshot.put_back()]))
        if start is not None:
            trainer.strategy.model_to_device()  # an inner Trainer leaves the module on the CPU
        if changed:
            rank_zero_warn(
                f"TinyQ: the {_NAMES[stage]} loop changed what cannot be put back ({', '.join(changed)}), so a run of "
                "it with other weights may not see what it saw"
            )
        if outside:
            rank_zero_warn(
                f"TinyQ: the {_NAMES[stage]} loop changed what is not put back ({', '.join(outside)}). If a metric "
                "depends on it, float and quantized metrics mix: keep it on the module, where each model has its own"
            )


def weights_digest(module: LightningModule) -> int:
    """Of a few values of each parameter: it tells whether other weights have been put in."""
    return batch_digest([parameter.detach() for parameter in module.parameters()])


def _datamodule(trainer: Trainer) -> LightningDataModule | None:
    return cast("LightningDataModule | None", trainer.datamodule)  # type: ignore[attr-defined]


def _combined_loader(trainer: Trainer, stage: Stage) -> CombinedLoader | None:
    loop = trainer.test_loop if stage == "test" else trainer.fit_loop.epoch_loop.val_loop
    return loop._combined_loader
