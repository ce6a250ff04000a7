"""A test run of the quantized model, with the float model and further methods tested once it has read its data.

The user's Trainer tests the quantized model of the first method. When its test epoch has ended, inner Trainers test
the others over the same dataloaders, each from the state that the run began with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from torch import nn

from tinyq_lightning.errors import EvaluationError
from tinyq_lightning.namespaces import namespace_of
from tinyq_lightning.plan import Swap, state_bytes
from tinyq_lightning.search import SIGNAL_BATCHES, BatchTimes, LayerError, Stopwatch, measured_layers
from tinyq_lightning.spec import QuantizationSpec
from tinyq_lightning.trainer.calibrating import calibrated_in_test
from tinyq_lightning.trainer.comparable import check_comparable
from tinyq_lightning.trainer.evaluation import (
    Evaluation,
    dataloaders,
    run_evaluation,
)
from tinyq_lightning.trainer.inner_trainer import state_roots
from tinyq_lightning.trainer.isolation import Snapshot
from tinyq_lightning.trainer.loop_watch import LoopWatch
from tinyq_lightning.trainer.results import Results, compare, numbers
from tinyq_lightning.trainer.tested import (
    FloatValues,
    SetByCallbacks,
    as_tested,
    float_values,
    log_of_test,
    may_exchange_weights,
)

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = [
    "TestRun",
    "at_test_epoch_end",
    "forget_test_start",
    "note_test_start",
]


def note_test_start(trainer: Trainer, module: LightningModule) -> None:
    """Have the state noted that a test run begins with: :class:`TestRun` goes back to it for each further model.

    Args:
        trainer: in ``setup``, whose loop has not begun. It may be noted already.
        module: the user's.
    """
    noted = _noted(trainer)
    if noted is not None and noted.snapshot is not None:  # of a run that failed
        noted.close()
        noted = None
    if noted is None:
        vars(trainer.test_loop)[_NOTED] = _TestStart(trainer, module)


def at_test_epoch_end(trainer: Trainer, call_back: Callable[[], object]) -> None:
    """Have ``call_back`` called after the user's own hooks at the end of the test epoch, where logging is legal."""
    start = _noted(trainer)
    assert start is not None
    start.on_epoch_end.append(call_back)


def forget_test_start(trainer: Trainer) -> None:
    """The test loop as it was, without the state that :func:`note_test_start` has noted."""
    if (noted := _noted(trainer)) is not None:
        noted.close()


# An attribute of a Trainer's test loop, and methods of the loop.
_NOTED, _HOOKS = "_tinyq_test_start", ("reset", "_on_evaluation_start", "_on_evaluation_epoch_end")


def _noted(trainer: Trainer) -> _TestStart | None:
    return vars(trainer.test_loop).get(_NOTED)


def _cached(module: nn.Module) -> dict[tuple[nn.Module, str], Any]:
    """The cached properties that have a value, each with the module that holds it."""
    return {
        (each, name): vars(each)[name]
        for each in module.modules()
        for name in vars(each)
        if isinstance(getattr(type(each), name, None), cached_property)
    }


class _TestStart:
    """The state that a test run begins with, before its loop opens the dataloaders, and a call when its epoch ends.

    Both are hooks on the Trainer's loop, since a callback's own hooks come too late or too early for them; the module
    is left as it is.

    Args:
        trainer: in ``setup``.
        module: the user's.

    Attributes:
        snapshot: the state; None until the loop begins.
        on_epoch_end: what to call after the user's own hooks at the end of the epoch.
        runs: of the Trainer; the layers of the first, which it tests, are taken out after that.
        tested: the tensors that are float in one of them, each with its values then; empty if no other callback could
            change them before they are saved.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self._module, self._loop = trainer, module, trainer.test_loop
        self.snapshot: Snapshot | None = None
        self._attributes: dict[str, Any] = {}  # of the Trainer
        self._cached: dict[tuple[nn.Module, str], Any] = {}
        self._callbacks: SetByCallbacks | None = None
        self.on_epoch_end: list[Callable[[], object]] = []
        self.runs: list[TestRun] = []
        self.tested: FloatValues = []
        self._own = {name: vars(self._loop).get(name) for name in _HOOKS}
        vars(self._loop)["reset"] = partial(self._reset, self._loop.reset)
        vars(self._loop)["_on_evaluation_start"] = partial(self._begin, self._loop._on_evaluation_start)
        vars(self._loop)["_on_evaluation_epoch_end"] = partial(self._end_epoch, self._loop._on_evaluation_epoch_end)

    def _reset(self, own: Callable[[], None]) -> None:
        roots = state_roots(self._trainer, self._module)
        self.snapshot = Snapshot(*roots, data=dataloaders(self._trainer, "test"), outside=True)
        self._attributes, self._cached = dict(vars(self._trainer)), _cached(self._module)
        own()

    def _begin(self, own: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        self._callbacks = SetByCallbacks(self._trainer, self._module)
        own(*args, **kwargs)

    def note_callbacks(self) -> None:
        """Have what callbacks have set in the module until now set for each further model."""
        assert self.snapshot is not None
        assert self._callbacks is not None
        self.snapshot.then.append(self._callbacks.noted())

    def _end_epoch(self, own: Callable[[], None]) -> None:
        own()
        # as inside of the module's own hook, where logging is legal and keeps what that has logged
        connector, hook_name = self._trainer._logger_connector, "on_test_epoch_end"
        before, self._module._current_fx_name = self._module._current_fx_name, hook_name
        connector._current_fx = hook_name
        try:
            for hook in self.on_epoch_end:
                hook()
            if self.runs:  # float in each on_test_end: a callback may put its own weights back there
                self.runs[0].swap.take_out()
                for (holder, name), value in _cached(self._module).items():
                    if self._cached.get((holder, name), self) is not value:  # computed by the quantized layers
                        del vars(holder)[name]
                if may_exchange_weights(self._trainer):
                    self.tested = float_values(self._module, [run.swap for run in self.runs])
        finally:
            self._module._current_fx_name, connector._current_fx = before, None

    def evaluation(self, swap: Swap | None) -> Evaluation:
        """Test the layers of ``swap``, or the float ones, from the state that the run began with."""
        assert self.snapshot is not None
        return run_evaluation(
            self._trainer, self._module, "test", start=self.snapshot, swap=swap, attributes=self._attributes
        )

    def close(self) -> None:
        """The loop as it was."""
        vars(self._loop).pop(_NOTED, None)
        for name, own in self._own.items():
            if own is None:
                vars(self._loop).pop(name, None)
            else:
                vars(self._loop)[name] = own


class TestRun:
    """One method in a test run.

    The first of several in one Trainer is what the Trainer tests; those after it and the float model are tested when
    the epoch has ended.

    Args:
        trainer: in ``on_test_start``, before the module's own hook of that name.
        module: the user's.
        spec: what to quantize.
        first: the run whose layers the Trainer tests already, or None where this is the first.
        stopwatch: for ``never_slower``: the first batch decides which layers are left float, in a rehearsal that
            leaves no trace. The module's own hooks at the start have run with all layers by then. Runs that share a
            stopwatch rehearse once. None: nothing is timed.

    Attributes:
        swap: the quantized layers.
        stopwatch: as given.
        results: float, quantized and delta of each metric, once they are measured.
        float_bytes: of the float state dict's tensors.
        bytes: of the quantized state dict's tensors.
        layers: output errors by layer, once those were watched.
        seconds: the time of a batch with quantized layers.
        float_seconds: the time of a batch with float layers.

    Raises:
        EvaluationError: ``test_step`` takes an iterator, or there is no validation data to calibrate by.
        ModelError: the model cannot be quantized.
        SpecError: the spec does not fit the model.
    """

    __test__ = False  # not a test case for pytest

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        spec: QuantizationSpec,
        first: TestRun | None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        signatures = namespace_of(trainer).module("utilities.signature_utils")
        if signatures.is_param_in_hook_signature(module.test_step, "dataloader_iter", explicit=True):
            raise EvaluationError(
                f"{type(module).__name__}.test_step takes a dataloader_iter, so nothing tells whether float and "
                "quantized model were given the same batches: let it take the batch"
            )
        start = _noted(trainer)
        assert start is not None
        if first is None:
            start.note_callbacks()
        self._trainer, self._module, self._start = trainer, module, start
        self._first = first or self
        self.stopwatch = stopwatch
        self.results: Results = {}
        self.layers: dict[str, LayerError] = {}
        self.seconds = self.float_seconds = BatchTimes()
        self._float: Evaluation | None = None
        self._watch, self._watching = LoopWatch(trainer.strategy.root_device), ExitStack()
        self._undecided = stopwatch is not None
        with first.swap.taken_out() if first else nullcontext():
            self.swap: Swap = calibrated_in_test(trainer, module, Swap(module, spec).or_refuse())
            self.float_bytes = state_bytes(module.state_dict())
            with self.swap:
                self.bytes = state_bytes(module.state_dict())
        if first is None:
            self.swap.put_in()
            self._watch.loop_started(trainer.test_loop)
        start.runs.append(self)

    def before_batch(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The Trainer's own step on a batch is about to begin."""
        if self._undecided:
            self._leave_slower_float(batch, batch_idx, dataloader_idx)
        if self._first is self:
            self._watch.batch_started(batch)

    def after_batch(self, *batch: Any, **kwargs: Any) -> None:
        """The Trainer's own step on a batch has ended."""
        if self._first is self:
            self._watch.batch_stepped()
        if len(self._first._watch.digests) == SIGNAL_BATCHES:
            self._watching.close()

    def _leave_slower_float(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        self._undecided = False
        assert self.stopwatch is not None
        if not self.stopwatch.calls:
            self._rehearse(batch, batch_idx, dataloader_idx)
        found = self.stopwatch.slower(self.swap) if self._trainer.is_global_zero else {}
        if changes := self._trainer.strategy.broadcast(found):
            with self._first.swap.taken_out() if self._first is not self else nullcontext():
                self.swap.take_out()
                self.swap = self.swap.switched(changes, "timing")
                with self.swap:
                    self.bytes = state_bytes(self._module.state_dict())
            if self._first is self:
                self.swap.put_in()

    def _rehearse(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Run the step on one batch while the calls of the layers are counted; everything is put back."""
        trainer, loop = self._trainer, self._trainer.test_loop
        several = loop._is_sequential and loop.num_dataloaders > 1
        kwargs = loop._build_kwargs(batch, batch_idx, dataloader_idx if several else None)
        before = Snapshot(batch, *state_roots(trainer, self._module))
        lightning = namespace_of(trainer)
        call = lightning.module("trainer.call")
        collection = lightning.module("trainer.connectors.logger_connector.result")._ResultCollection
        results, loop._results = loop._results, collection(training=False)
        connector = trainer._logger_connector
        fx, connector._current_fx = connector._current_fx, None
        loop._results.batch, loop._results.dataloader_idx = batch, results.dataloader_idx
        try:
            with ExitStack() as stack:
                if self._first is not self:
                    stack.enter_context(self._first.swap.taken_out())
                    stack.enter_context(self.swap)
                assert self.stopwatch is not None
                stack.enter_context(self.stopwatch.watching(self.swap))
                call._call_lightning_module_hook(trainer, "on_test_batch_start", *kwargs.values())
                arguments = loop._build_step_args_from_hook_kwargs(kwargs, "test_step")
                call._call_strategy_hook(trainer, "test_step", *arguments)
        finally:
            loop._results, connector._current_fx = results, fx
            before.put_back()

    def watch_layers(self, others: Sequence[TestRun]) -> None:
        """Have the layers of this run and of others measured on the first batches, as the Trainer's steps run them."""
        swaps = (each.swap for each in others)
        self.layers = self._watching.enter_context(measured_layers(self.swap, *swaps))

    @property
    def module(self) -> LightningModule:
        """The user's."""
        return self._module

    def log(self, entries: dict[str, float]) -> None:
        """Log at the end of the epoch, through the module."""
        log_of_test(self._trainer, self._module, entries)

    def close(self) -> None:
        """The float layers back."""
        self._watching.close()
        self._start.close()
        if self._first is self:
            self._watch.batches_ended()  # where the test has failed
            self.swap.take_out()

    def tested(self) -> AbstractContextManager[None]:
        """The quantized layers in, and the rest as it was tested, whatever callbacks have put in since."""
        return as_tested(self.swap, self._start.tested)

    def end_batches(self) -> None:
        """The Trainer's own steps on all batches have ended.

        Raises:
            EvaluationError: a StopIteration has ended them too early.
        """
        self._watching.close()
        if self._first is self:
            self._watch.batches_ended()
            self._watch.refuse_lost_batch(self._module, self._trainer.test_loop)

    def measure(self) -> None:
        """Test what the Trainer does not test itself, after :meth:`end_batches`, and compare.

        Raises:
            EvaluationError: a test failed, or the models cannot be compared.
        """
        if self._first is self:
            logged = numbers(self._trainer.callback_metrics)
            own = self._trainer.strategy.broadcast((logged, self._watch.seconds_per_batch))
            after = Evaluation(own[0], {}, own[1], tuple(self._watch.digests))
            self._float = self._start.evaluation(None)
        else:
            after = self._start.evaluation(self.swap)
        before = self._first._float
        if before is None:
            raise EvaluationError("the float model could not be tested, as the error of the first TinyQCallback says")
        check_comparable(self._trainer, before, after)
        self.float_seconds, self.seconds = before.seconds_per_batch, after.seconds_per_batch
        self.results = compare(before.metrics, after.metrics, self.swap.plan.label)
