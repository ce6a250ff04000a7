"""The quantized model through the user's test loop, with the float one beside it, batch by batch.

The dataloader is read once: after the Trainer's ``test_step`` on a batch, the user's hooks and
``test_step`` run again on the same batch with the other layers in the module, with attributes, metric
states, logged results and random numbers of their own. Reading the dataloader a second time instead
would break those with persistent workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from tinyq_lightning.errors import EvaluationError
from tinyq_lightning.plan import Swap, state_bytes
from tinyq_lightning.search import SIGNAL_BATCHES, BatchTimes, LayerError, Stopwatch, measured_layers
from tinyq_lightning.spec import QuantizationSpec
from tinyq_lightning.trainer.isolation import Attributes, RandomState, rewound_randomness
from tinyq_lightning.trainer.results import Results, compare, numbers

__all__ = [
    "TestRun",
]


class TestRun:
    """A test run of the quantized model with the float one beside it.

    The first of several in one Trainer is what the Trainer tests; those after it run beside it, as the
    float model does.

    Args:
        trainer: in ``on_test_start``, before the module's own hook of that name.
        module: the user's.
        spec: what to quantize.
        first: the run whose layers the Trainer tests already, or None where this is the first.
        on_results: called once the epoch has ended, where the module may still log.
        stopwatch: for ``never_slower``: a dataloader is read once, so the first batch decides which layers are
            left float, in a rehearsal that leaves no trace. The module's own hooks at the start have run with
            all layers by then. Runs that share a stopwatch rehearse once. None: nothing is timed.

    Attributes:
        swap: the quantized layers.
        stopwatch: as given.
        results: float, quantized and delta of each metric, once the epoch has ended.
        float_bytes: of the float state dict's tensors.
        bytes: of the quantized state dict's tensors.
        layers: output errors by layer, once those were watched.

    Raises:
        EvaluationError: ``test_step`` takes an iterator, from which a batch can be read only once.
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
        on_results: Callable[[TestRun], None],
        stopwatch: Stopwatch | None = None,
    ) -> None:
        if is_param_in_hook_signature(module.test_step, "dataloader_iter", explicit=True):
            raise EvaluationError(
                f"{type(module).__name__}.test_step takes a dataloader_iter, which gives each batch once, so float and "
                "quantized results cannot be had in one run: let it take the batch"
            )
        self._trainer, self._module, self._first, self._on_results = trainer, module, first, on_results
        self.stopwatch = stopwatch
        self.results: Results = {}
        self.layers: dict[str, LayerError] = {}
        self._watching = ExitStack()
        self._own_seconds: list[float] = []
        self._beside_seconds: list[float] = []
        self._began = 0.0
        self._float_metrics: dict[str, float] = {}
        self._undecided = stopwatch is not None
        self._rehearsal: _World | None = None
        self._own_hook: Callable[[], Any] = first._own_hook if first else module.on_test_epoch_end
        with ExitStack() as stack:
            if first is not None:
                stack.enter_context(first.swap.taken_out())
            self.swap: Swap = Swap(module, spec).or_refuse()
            self.float_bytes = state_bytes(module.state_dict())
            with self.swap:
                self.bytes = state_bytes(module.state_dict())
            if first:
                stack.enter_context(self.swap)
            self._beside = _World(trainer, module)
            if stopwatch and not stopwatch.calls:
                with nullcontext() if first else self.swap, stopwatch.watching(self.swap):
                    self._rehearsal = _World(trainer, module)  # the layers are watched in this world only
        if first is None:
            self.swap.put_in()
        vars(module)["on_test_epoch_end"] = partial(self._end_epoch, module.on_test_epoch_end)

    def before_batch(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The Trainer's own step on a batch is about to begin."""
        if self._undecided:
            self._leave_slower_float(batch, batch_idx, dataloader_idx)
        self._beside.before_batch()
        self._began = time.perf_counter()

    def _leave_slower_float(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        self._undecided = False
        if self._rehearsal is not None:
            with rewound_randomness():
                self._rehearsal.before_batch()
                self._rehearsal.after_batch(batch, batch_idx, dataloader_idx)
            self._rehearsal = None
        found = self.stopwatch.slower(self.swap) if self.stopwatch and self._trainer.is_global_zero else {}
        if changes := self._trainer.strategy.broadcast(found):
            with self._beside.entered() if self._first else nullcontext():  # the world that holds its layers
                self.swap.take_out()
                self.swap = self.swap.switched(changes)
                self.swap.put_in()
                self.bytes = state_bytes(self._module.state_dict())

    def after_batch(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The Trainer's own step has ended; run the user's hooks and step beside it."""
        start = time.perf_counter()
        self._own_seconds.append(start - self._began)
        self._beside.after_batch(batch, batch_idx, dataloader_idx)
        self._beside_seconds.append(time.perf_counter() - start)
        if len(self._own_seconds) == SIGNAL_BATCHES:
            self._watching.close()

    def watch_layers(self) -> None:
        """Have the layers measured on the first batches, as the Trainer's own steps run them."""
        self.layers = self._watching.enter_context(measured_layers(self.swap))

    @property
    def module(self) -> LightningModule:
        """The user's."""
        return self._module

    @property
    def float_seconds(self) -> BatchTimes:
        """The time of a batch with float layers."""
        return self._first.float_seconds if self._first else BatchTimes.of(self._beside_seconds)

    @property
    def seconds(self) -> BatchTimes:
        """The time of a batch with quantized layers."""
        return BatchTimes.of(self._beside_seconds if self._first else self._own_seconds)

    def log(self, entries: dict[str, float]) -> None:
        """Log through the module, as its own hook at the end of the epoch would."""
        self._module.log_dict(entries, sync_dist=self._trainer.world_size > 1, add_dataloader_idx=False)

    def close(self) -> None:
        """The float layers and the module's own hook back."""
        self._watching.close()
        vars(self._module).pop("on_test_epoch_end", None)
        if self._first is None:
            self.swap.take_out()

    def _end_epoch(self, inner: Callable[[], Any]) -> None:
        inner()
        self._watching.close()
        beside = self._beside.finish(self._own_hook)
        label = self.swap.plan.label
        if self._first:
            results = compare(self._first._float_metrics, beside, label)
        else:
            self._float_metrics = beside
            results = compare(beside, numbers(self._trainer.callback_metrics), label)
        self.results = self._trainer.strategy.broadcast(results)
        self._on_results(self)


class _World:
    """The module with the layers it holds now, to be entered batch by batch while it holds others."""

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self._module, self._loop = trainer, module, trainer.test_loop
        self._results = _ResultCollection(training=False)
        self._metrics: dict[str, Any] = {}
        self._dataloader: int | None = None
        self._random: RandomState | None = None
        self._started = False
        here = Attributes(module)
        for each in module.modules():  # metrics add to their states in place
            vars(each).update({k: v.clone() for k, v in vars(each).items() if isinstance(v, Tensor)})
        self._attributes = Attributes(module)
        here.put_back()

    def before_batch(self) -> None:
        """Note the random state that the Trainer's own step begins with."""
        self._random = RandomState()
        if not self._started:
            self._started = True
            with self.entered():
                call._call_lightning_module_hook(self._trainer, "on_test_start")
                call._call_lightning_module_hook(self._trainer, "on_test_epoch_start")

    def after_batch(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        trainer, loop = self._trainer, self._loop
        several = loop._is_sequential and loop.num_dataloaders > 1
        kwargs = loop._build_kwargs(batch, batch_idx, dataloader_idx if several else None)
        with rewound_randomness(), self.entered():
            if self._random is not None:
                self._random.put_back()
            if several and dataloader_idx != self._dataloader:
                self._collect()
            self._dataloader = dataloader_idx if several else None
            self._results.batch, self._results.batch_size = batch, None
            self._results.dataloader_idx = self._dataloader
            call._call_lightning_module_hook(trainer, "on_test_batch_start", *kwargs.values())
            arguments = loop._build_step_args_from_hook_kwargs(kwargs, "test_step")
            output = call._call_strategy_hook(trainer, "test_step", *arguments)
            call._call_lightning_module_hook(trainer, "on_test_batch_end", output, *kwargs.values())
            self._results.batch = self._results.batch_size = None

    def finish(self, on_test_epoch_end: Callable[[], Any]) -> dict[str, float]:
        """The user's hook at the end of the epoch, and all that was logged in this world, by name."""
        if not self._started:
            return {}
        with self.entered():
            self._collect()
            self._results.dataloader_idx = None
            self._module._current_fx_name = "on_test_epoch_end"
            on_test_epoch_end()
            self._collect()
        return numbers(self._metrics)

    def _collect(self) -> None:
        """Take the epoch's metrics of the dataloader that has ended."""
        self._metrics |= self._results.metrics(on_step=False)["callback"]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This world's attributes in the module, its results in the loop."""
        here, connector = Attributes(self._module), self._trainer._logger_connector
        fx, results = connector._current_fx, self._loop._results
        self._attributes.put_back()
        self._loop._results = self._results
        try:
            yield
        finally:
            self._attributes = Attributes(self._module)
            self._loop._results, connector._current_fx = results, fx
            here.put_back()
