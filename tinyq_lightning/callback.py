"""``TinyQCallback``: after fit or test, saves a quantized checkpoint and reports each metric for both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import dropwhile, takewhile
from typing import TYPE_CHECKING, Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from tinyq_lightning.errors import SpecError
from tinyq_lightning.handover import check_formats
from tinyq_lightning.plan import Plan
from tinyq_lightning.report import (
    Outcome,
    column_name,
    combined,
    log_entries,
    outcome_of_fit,
    outcome_of_shards,
    outcome_of_test,
    quantized_content,
    report_steps,
)
from tinyq_lightning.search import Stopwatch
from tinyq_lightning.spec import SpecOrMethods, as_spec, names_near_keywords, with_arguments
from tinyq_lightning.trainer import (
    FloatWeights,
    HoldsRun,
    MethodsRun,
    QuantizedStart,
    TestRun,
    at_test_epoch_end,
    check_before_fit,
    check_budget,
    choose_float_weights,
    export_beside_file,
    files_before_fit,
    forget_test_start,
    is_sharded,
    note_test_start,
    numbers,
    preserved,
    quantize_sharded,
    refuse_mixed_packages,
    refuse_sharding,
    return_to_main_process,
    save_quantized,
    step_after_run,
    tell_of_interrupt,
    tell_of_quantized_layers,
    tested_weights,
    validation_data_lent,
    warn_of_no_limit,
    warn_of_worst_checkpoint,
)

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["TinyQCallback"]


class TinyQCallback(HoldsRun):
    """Quantizes the model of a run, measures it with the user's own loop, and saves it beside the float checkpoint.

    With ``when="fit_end"`` the best checkpoint is quantized when training ends, and the validation loop
    is run on the float and on the quantized weights. With ``when="test_start"`` a test run tests the quantized
    model, and then the float one on the same batches. Afterwards the module has its float layers and weights
    again, the same objects.

    With ``monitor`` and ``max_drop``, a search leaves layers float (or gives them more bits of activation)
    until the metric loses no more than ``max_drop``; see :func:`tinyq_lightning.search.budget.search`. If no
    plan is within the budget, the best one found is saved, with a warning.

    With several methods, the float model is measured once and one file is saved for each method.
    ``ckpt_path`` of ``test``, ``validate`` and ``predict`` may be a quantized checkpoint.

    Args:
        spec: a method (``w8a32``, ``w8a16``, ``w8a8``, ``w4a32``, ``w4a16``, ``w4a8``), several, a path to YAML, a
            mapping, or a QuantizationSpec.
        exclude: patterns of layers to leave float, added to those of the spec.
        kinds: ``all``, or a list of the kinds of layer to quantize; overrides the spec.
        when: ``fit_end`` or ``test_start``; overrides the spec.
        weights: ``best``, ``last`` or ``current``; overrides the spec. Only for ``fit_end``.
        monitor: name of a metric that validation logs: the budget's, and that of the ModelCheckpoint to take.
        mode: ``max`` or ``min``; needed with ``max_drop`` unless a torchmetrics object is logged, which knows it.
        max_drop: how much the metric may lose, in its unit or as a share of the float value such as ``1%``.
        keep: of several methods ``all``, or with a budget the ``smallest`` within it; overrides the spec.
        never_slower: whether to time the layers, and leave float what is slower quantized here; overrides the spec.
        calibrate: choose codes by what they do to the outputs of layers on so many validation batches, a number or
            ``{"batches": 8}``; overrides the spec. With ``test_start`` too it is validation data, never what is tested.
        save: whether to write the quantized checkpoint.
        dirpath: the folder of the quantized checkpoint; by default that of the float one, of the run's ModelCheckpoint,
            or ``default_root_dir``.
        filename: the name of the quantized checkpoint; by default ``<method>-<float stem>.ckpt``.
        report: whether to print the comparison and the layers, log them to loggers that take tables or text, and write
            ``.json``, ``.html`` and ``.yaml`` beside the checkpoint. ``full`` adds output SQNR, crest factor and time.
        export: a format, or several, in which each quantized model is exported beside its checkpoint; overrides the
            spec. ``{"to": "onnx", "activations": "static"}`` takes ranges from validation batches, and measures the
            export. Inputs are the ``example_input_array``, or those of the first batch. Failing is a warning.
        log_files: whether to give checkpoints, exports and reports to loggers that take artifacts.
        strict: whether an error after training or testing is raised. By default it is a warning with the reason,
            ``error`` holds it, and the run ends as without the callback. What is wrong before training is raised.

    Attributes:
        quantized_paths: path of each file that was written, by method; one for methods that ended as the same plan.
        float_path: path of the checkpoint that was quantized, or None.
        plan: the decision for each layer (of several methods, of the first that was saved); None before a run.
        plans: the plan of each method.
        results: ``{"val_acc": {"float": …, "w8a32": …, "delta": …}}``, or with several methods
            ``{"val_acc": {"float": …, "w8a32": …, "delta/w8a32": …, "w8a8": …, "delta/w8a8": …}}``. The key is
            the plan's label (``mixed`` where it mixes methods); among several, the method asked for.
        search: what the budget's search measured and chose for the saved plan; None without a budget.
        error: what failed after training or testing (if several things, the first), on every rank; None if
            nothing failed. Its ``__cause__`` is the exception as it was raised.

    Raises:
        SpecError: the spec or an argument is wrong.
    """

    @names_near_keywords
    def __init__(
        self,
        spec: SpecOrMethods = "w8a32",
        *,
        exclude: Sequence[str] = (),
        kinds: Literal["all"] | Sequence[str] | None = None,
        when: Literal["fit_end", "test_start"] | None = None,
        weights: Literal["best", "last", "current"] | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
        max_drop: float | str | None = None,
        keep: Literal["all", "smallest"] | None = None,
        never_slower: bool | None = None,
        calibrate: int | Mapping[str, int] | None = None,
        save: bool = True,
        dirpath: str | None = None,
        filename: str | None = None,
        report: bool | Literal["full"] = True,
        export: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] | None = None,
        log_files: bool = False,
        strict: bool = False,
    ) -> None:
        if report not in (True, False, "full"):
            raise SpecError(f"report must be True, False or 'full', not {report!r}")
        given: dict[str, Any] = {"kinds": kinds, "when": when, "weights": weights, "keep": keep}
        given |= {"never_slower": never_slower, "calibrate": calibrate, "export": export}
        budget = {"monitor": monitor, "mode": mode, "max_drop": max_drop}
        self.spec = with_arguments(as_spec(spec), exclude, given, budget, {"dirpath": dirpath, "filename": filename})
        self.monitor = self.spec.budget.monitor if self.spec.budget else monitor
        self.save, self.report, self.log_files, self.strict = save, report, log_files, strict
        self.keeps_batch = bool(self.spec.export)
        if self.spec.export and not save:
            raise SpecError("exports are written beside the quantized checkpoint, so export= needs save=True")
        self._begin()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies that cannot work, and let ``ckpt_path`` be a quantized checkpoint."""
        refuse_mixed_packages(trainer)
        refuse_sharding(trainer, self.spec.when)
        check_formats(each.to for each in self.spec.export)
        earlier = takewhile(lambda each: each is not self, _tinyq_callbacks(trainer))
        self._earlier = [each for each in earlier if each.spec.when == self.spec.when]
        self._quantized_start = QuantizedStart(trainer, pl_module)
        if stage == "test" and self.spec.when == "test_start":
            self._reset_results()
            note_test_start(trainer, pl_module)
        return_to_main_process(trainer, self._key, self._outcome)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse before training what could not be quantized, measured or saved after it."""
        super().on_fit_start(trainer, pl_module)
        if self.spec.when == "fit_end":
            self._reset_results()
            self._told = check_before_fit(trainer, pl_module, self.spec, self.monitor, self.save)
            self._files_before = files_before_fit(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the budget against the metrics of each validation; the first is the sanity check before training."""
        super().on_validation_end(trainer, pl_module)
        if self.spec.when != "fit_end" or trainer.state.fn != "fit":
            return
        if self.spec.budget:
            check_budget(trainer, self.spec.budget)
            warn_of_no_limit(trainer, self.spec.budget, self._told_metrics)
        elif self.spec.weights == "best":
            warn_of_worst_checkpoint(trainer, self.monitor, self._told_metrics)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resolve, swap, evaluate, save and report; the module is unchanged afterwards."""
        if self.spec.when == "fit_end":
            outcomes: list[Outcome] = []
            with step_after_run(self, trainer, "Quantizing"):
                outcomes = self._quantize_after_fit(trainer, pl_module)
            if outcomes:
                self._report(trainer, outcomes)

    def _quantize_after_fit(self, trainer: Trainer, module: LightningModule) -> list[Outcome]:
        source = choose_float_weights(trainer, self.spec.weights, self.monitor, self._files_before)
        self.float_path = source.path
        outcomes: list[Outcome] = []
        if is_sharded(trainer):
            for made in quantize_sharded(trainer, module, self.spec, source):
                outcome = outcome_of_shards(made, self._column_name(made.plan), source)
                outcomes.append(self._save(trainer, None, source, outcome, made.take_content, outcomes))
            return outcomes
        with preserved(module, weights=source.path is not None), validation_data_lent(trainer, module):
            source.load_into(trainer, module)
            run = MethodsRun(trainer, module, self.spec, source, self.validated)
            for measured in run.methods:
                layers = run.layers if measured.searched or (self.report == "full" and run.before) else {}
                outcome = outcome_of_fit(run, measured, self._column_name(measured.plan), layers, source)
                if measured.kept:
                    with measured.swap:
                        content = quantized_content(module, source, outcome, "validate")
                        outcome = self._save(trainer, module, source, outcome, content, outcomes)
                outcomes.append(outcome)
        if run.why_not:
            rank_zero_warn(f"TinyQ: quantized without a comparison: {run.why_not}")
        return outcomes

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the quantized layers in for the Trainer to test; the float model is tested after it."""
        if self._quantized_start and self._quantized_start.label:
            return
        if self.spec.when != "test_start":
            others = _tinyq_callbacks(trainer)
            if self.plan is None and self is others[0] and all(each.spec.when != "test_start" for each in others):
                rank_zero_info("TinyQ: the float model is tested: quantizing it here takes when='test_start'")
            return
        before = [run for callback in _tinyq_callbacks(trainer) for run in callback._runs]
        stopwatch = Stopwatch() if self.spec.never_slower else None
        for spec in self.spec.each():
            self._runs.append(TestRun(trainer, pl_module, spec, next(iter(before + self._runs), None), stopwatch))
        if self.report == "full":
            self._runs[0].watch_layers(self._runs[1:])
        at_test_epoch_end(trainer, lambda: self._measure_in_test(trainer))

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Start the clock on the Trainer's own step; before the first batch, decide which layers stay float."""
        self.keep_batch(trainer, args[0])
        for run in self._runs:
            run.before_batch(*args, **kwargs)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """The Trainer's own step has ended; the other models are tested at the end of the epoch."""
        for run in self._runs:
            run.after_batch(*args, **kwargs)

    def _measure_in_test(self, trainer: Trainer) -> None:
        for run in self._runs:
            run.end_batches()
        with step_after_run(self, trainer, "Testing the models to compare with"):
            for run in self._runs:
                run.measure()
            outcomes = [self._outcome_of_test(each) for each in self._runs]
            self._runs[-1].log(log_entries(outcomes, alone=not self._earlier))

    def _outcome_of_test(self, run: TestRun, source: FloatWeights | None = None) -> Outcome:
        return outcome_of_test(run, self._column_name(run.swap.plan), self._runs[0].layers, source)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save and report the quantized models, with the float layers back in the module."""
        if self._runs and self.error is None:
            self._save_after_test(trainer, pl_module)
        elif not self.results and self._quantized_start and (label := self._quantized_start.label):
            self.quantized_paths = {label: str(trainer.ckpt_path)}
            self.results = {name: {label: value} for name, value in numbers(trainer.callback_metrics).items()}
        self._close_test_runs()

    def _save_after_test(self, trainer: Trainer, module: LightningModule) -> None:
        outcomes: list[Outcome] = []
        with step_after_run(self, trainer, "Quantizing"):
            source = tested_weights(trainer, self._quantized_start.restored if self._quantized_start else None)
            self.float_path = source.path
            for run in self._runs:
                with run.tested():
                    outcome = self._outcome_of_test(run, source)
                    content = quantized_content(module, source, outcome, "test")
                    outcomes.append(self._save(trainer, module, source, outcome, content, outcomes))
        self._close_test_runs()
        if outcomes:
            self._report(trainer, outcomes)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo what this callback changed in the module."""
        self._restore_module(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Undo what this callback changed in the module: Lightning calls no teardown after an exception."""
        if self._runs:
            callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            tell_of_quantized_layers(exception, [*dropwhile(lambda each: each is not self, callbacks)][1:])
        self._restore_module(trainer)
        refuse_mixed_packages(trainer)  # of a data module Lightning says only that it expected a parent
        if isinstance(exception, KeyboardInterrupt) and (self.spec.when, trainer.state.fn) == ("fit_end", "fit"):
            tell_of_interrupt(trainer, dict.fromkeys(self.quantized_paths.values()))

    def _restore_module(self, trainer: Trainer) -> None:
        self._close_test_runs()
        forget_test_start(trainer)
        if self._quantized_start is not None:
            self._quantized_start.close()
            self._quantized_start = None

    def _close_test_runs(self) -> None:
        for run in self._runs:
            run.close()
        self._runs = []

    def _column_name(self, plan: Plan) -> str:
        plans = [(each.spec, [*each.plans.values(), *(run.swap.plan for run in each._runs)]) for each in self._earlier]
        return column_name(self.spec, plan, plans)

    def _save(
        self,
        trainer: Trainer,
        module: LightningModule | None,
        source: FloatWeights,
        outcome: Outcome,
        content: Callable[[], dict[str, Any]],
        earlier: Sequence[Outcome],
    ) -> Outcome:
        """Write the quantized checkpoint if one is wanted, and the exports of ``module``, which is quantized now.

        A method that ended as the plan of an earlier one has its file.
        """
        self.plan, self.search = self.plan or outcome.plan, self.search or outcome.search
        if not self.save or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return outcome
        for each in earlier:
            if each.quantized_path and each.plan.has_codes_of(outcome.plan):
                self.quantized_paths[outcome.name] = each.quantized_path
                return replace(outcome, quantized_path=each.quantized_path, same_as=each.name)
        with step_after_run(self, trainer, "Saving the quantized checkpoint"):
            taken = {path for callback in _tinyq_callbacks(trainer) for path in callback.quantized_paths.values()}
            path, self._told = save_quantized(trainer, source, outcome.plan, content, taken, self._told)
            self.quantized_paths[outcome.name] = path
            exports = () if module is None else export_beside_file(self, trainer, module, outcome.plan, path)
            return replace(outcome, quantized_path=path, exports=exports)
        return outcome

    def _report(self, trainer: Trainer, outcomes: list[Outcome]) -> None:
        """Set the results, warn if a budget was not met, and log, show and write them; each step may fail alone."""
        self.results = combined(outcomes)
        self.plans = {outcome.name: outcome.plan for outcome in outcomes}
        steps = report_steps(trainer.state.fn == "fit", not self._earlier, bool(self.report), self.log_files)
        for name, step in steps:
            with step_after_run(self, trainer, name):
                step(trainer, outcomes)


def _tinyq_callbacks(trainer: Trainer) -> list[TinyQCallback]:
    """The TinyQCallbacks of the run, in order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, TinyQCallback)]  # type: ignore[attr-defined]
