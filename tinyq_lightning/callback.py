"""``TinyQCallback``: after fit or test, saves an int8 checkpoint and reports each metric for float and int8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from tinyq_lightning.errors import SpecError, TinyQError
from tinyq_lightning.file import check_folder, make_checkpoint, quantized_path, write_checkpoint
from tinyq_lightning.plan import Plan, check_patterns
from tinyq_lightning.report import (
    Outcome,
    combined,
    log_entries,
    log_outcomes,
    log_tables,
    outcome_of_fit,
    outcome_of_test,
    show,
    write_report,
)
from tinyq_lightning.search import Search, Stopwatch
from tinyq_lightning.spec import SpecOrMethods, as_spec, with_arguments
from tinyq_lightning.trainer import (
    FloatWeights,
    MethodsRun,
    QuantizedStart,
    Results,
    TestRun,
    TestStart,
    check_monitor,
    choose_float_weights,
    directions,
    known_mode,
    numbers,
    preserved,
    refuse_sharding,
    refuse_without_validation,
    tested_weights,
    why_never_validated,
    why_no_validation,
    write_on_rank_zero,
)

__all__ = [
    "TinyQCallback",
]

_HOW_TO_QUANTIZE = (
    "TinyQCallback(..., when='test_start') with Trainer.test(model, ckpt_path=...) quantizes a float checkpoint."
)

_SANITY_CHECK_ADVICE = ". This was the sanity check: if the metric is logged only later, set num_sanity_val_steps=0"


class TinyQCallback(Callback):
    """Quantizes the model of a run, measures it with the user's own loop, and saves it beside the float checkpoint.

    With ``when="fit_end"`` the best checkpoint is quantized when training ends, and the validation loop
    is run on the float and on the quantized weights. With ``when="test_start"`` a test run tests the quantized
    model, and then the float one on the same batches. Afterwards the module has its float layers and weights
    again, the same objects.

    With ``monitor`` and ``max_drop``, a search leaves layers float (or gives them more bits of activation)
    until the metric loses no more than ``max_drop``; see :func:`tinyq_lightning.search.budget.search`. If no
    plan is within the budget, the best one found is saved, with a warning.

    With several methods, the float model is measured once and one file is saved for each method.

    In both cases ``ckpt_path`` of ``test``, ``validate`` and ``predict`` may be a quantized checkpoint.

    Args:
        spec: a method (``w8a32``, ``w8a16``, ``w8a8``), a list of them, a path to YAML, a mapping, or a
            QuantizationSpec.
        exclude: patterns of layers to leave float, added to those of the spec.
        when: ``fit_end`` or ``test_start``; overrides the spec.
        weights: ``best``, ``last`` or ``current``; overrides the spec. Only for ``fit_end``.
        monitor: name of a metric that validation logs. It is the budget's metric and, for ``weights``, selects
            the ModelCheckpoint that monitors it.
        mode: ``max`` if more is better, ``min`` if less is. Needed with ``max_drop`` unless the metric is logged
            as a torchmetrics object that knows it.
        max_drop: how much the metric may lose, in its unit or as a share of the float value such as ``1%``.
        keep: of several methods: ``all``, or with a budget the ``smallest`` within it (ties: least loss);
            overrides the spec.
        never_slower: whether to time the layers as the evaluation calls them, and to leave float those that int8
            makes slower on this machine; overrides the spec.
        save: whether to write the quantized checkpoint.
        dirpath: the folder of the quantized checkpoint; by default that of the float checkpoint, or
            ``default_root_dir``.
        filename: the name of the quantized checkpoint; by default ``<method>-<float stem>.ckpt``.
        report: whether to print the comparison and the layers, send them to the loggers that take tables or
            text, and write ``.json``, ``.html`` and ``.yaml`` (the plan as a spec) beside the quantized
            checkpoint. ``full`` adds each layer's output SQNR, crest factor and time, from a few batches.

    Attributes:
        quantized_path: path of the file that was written (with several methods, of the first), or None.
        quantized_paths: path of each file that was written, by method.
        float_path: path of the checkpoint that was quantized, or None.
        plan: the decision for each layer (with several methods, of the first that was saved); None before a run.
        plans: the plan of each method.
        results: ``{"val_acc": {"float": …, "w8a32": …, "delta": …}}``, or with several methods
            ``{"val_acc": {"float": …, "w8a32": …, "delta/w8a32": …, "w8a8": …, "delta/w8a8": …}}``. The key is
            the plan's label (``mixed`` where it mixes methods); among several, the method asked for. Empty
            before a run.
        search: what the budget's search measured and chose for the saved plan; None without a budget.

    Raises:
        SpecError: the spec or an argument is wrong.
    """

    def __init__(
        self,
        spec: SpecOrMethods = "w8a32",
        *,
        exclude: Sequence[str] = (),
        when: Literal["fit_end", "test_start"] | None = None,
        weights: Literal["best", "last", "current"] | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
        max_drop: float | str | None = None,
        keep: Literal["all", "smallest"] | None = None,
        never_slower: bool | None = None,
        save: bool = True,
        dirpath: str | None = None,
        filename: str | None = None,
        report: bool | Literal["full"] = True,
    ) -> None:
        if report not in (True, False, "full"):
            raise SpecError(f"report must be True, False or 'full', not {report!r}")
        given = {"when": when, "weights": weights, "keep": keep, "never_slower": never_slower}
        budget = {"monitor": monitor, "mode": mode, "max_drop": max_drop}
        self.spec = with_arguments(as_spec(spec), exclude, given, budget, {"dirpath": dirpath, "filename": filename})
        self.monitor = self.spec.budget.monitor if self.spec.budget else monitor
        self.save, self.report = save, report
        self._quantized_start: QuantizedStart | None = None
        self._test_start: TestStart | None = None
        self._runs: list[TestRun] = []
        self._earlier: list[TinyQCallback] = []
        self._reset_results()

    def _reset_results(self) -> None:
        self.quantized_paths: dict[str, str] = {}
        self.float_path: str | None = None
        self.plan: Plan | None = None
        self.plans: dict[str, Plan] = {}
        self.results: Results = {}
        self.search: Search | None = None

    @property
    def quantized_path(self) -> str | None:
        """Path of the file that was written (with several methods, of the first), or None."""
        return next(iter(self.quantized_paths.values()), None)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies that cannot work, and let ``ckpt_path`` be a quantized checkpoint."""
        refuse_sharding(trainer)
        earlier = takewhile(lambda each: each is not self, _tinyq_callbacks(trainer))
        self._earlier = [each for each in earlier if each.spec.when == self.spec.when]
        self._quantized_start = QuantizedStart(trainer, pl_module)
        if stage == "test" and self.spec.when == "test_start":
            self._test_start = TestStart(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse before training what could not be quantized, measured or saved after it."""
        if self.spec.when == "fit_end":
            for spec in self.spec.each():
                check_patterns(spec, pl_module)
            check_folder(self.spec)
            if self.spec.weights != "current" and self.spec.budget is None:
                check_monitor(trainer, self.monitor)
            refuse_without_validation(self.spec, why_never_validated(trainer, pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the budget against the metrics of each validation; the first is the sanity check before training."""
        budget, logged = self.spec.budget, trainer.callback_metrics
        fits = trainer.state.fn == TrainerFn.FITTING and self.spec.when == "fit_end"
        sanity = trainer.sanity_checking and logged  # a sanity check that logs nothing shows nothing
        if budget and fits and (sanity or budget.monitor in logged):
            known_mode(budget, logged, directions(trainer), _SANITY_CHECK_ADVICE if sanity else "")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resolve, swap, evaluate, save and report; the module is unchanged afterwards."""
        if self.spec.when != "fit_end":
            return
        self._reset_results()
        try:
            self._quantize_after_fit(trainer, pl_module)
        except Exception as error:
            raise _as_tinyq_error(error, self.float_path) from error

    def _quantize_after_fit(self, trainer: Trainer, module: LightningModule) -> None:
        source = choose_float_weights(trainer, self.spec.weights, self.monitor)
        self.float_path = source.path
        outcomes = []
        with preserved(module, weights=source.path is not None):
            source.load_into(trainer, module)
            run = MethodsRun(trainer, module, self.spec, why_no_validation(trainer, module))
            for measured in run.methods:
                layers = run.layers if measured.searched or (self.report == "full" and run.before) else {}
                outcome = outcome_of_fit(run, measured, self._column_name(measured.plan), layers, source)
                if measured.kept:
                    with measured.swap:
                        outcome = self._save(trainer, module, source, outcome, "validate")
                outcomes.append(outcome)
        if run.why_not:
            rank_zero_warn(f"TinyQ: quantized without a comparison: {run.why_not}")
        log_outcomes(trainer, outcomes, alone=not self._earlier)
        self._report(trainer, outcomes)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the quantized layers in for the Trainer to test; the float model is tested after it."""
        if self._test_start is None or self._tests_a_quantized_file():
            return
        self._reset_results()
        first = next((run for callback in _tinyq_callbacks(trainer) for run in callback._runs), None)
        stopwatch = Stopwatch() if self.spec.never_slower else None
        for spec in self.spec.each():
            self._runs.append(TestRun(trainer, pl_module, spec, self._test_start, first, self._log_results, stopwatch))
            first = first or self._runs[0]
        if self.report == "full":
            self._runs[0].watch_layers()

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Start the clock on the Trainer's own step."""
        for run in self._runs:
            run.before_batch(*args, **kwargs)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Stop the clock on the Trainer's own step."""
        for run in self._runs:
            run.after_batch()

    def _log_results(self, run: TestRun) -> None:
        if run is self._runs[-1]:
            run.log(log_entries([self._outcome_of_test(each) for each in self._runs], alone=not self._earlier))

    def _outcome_of_test(self, run: TestRun, source: FloatWeights | None = None) -> Outcome:
        return outcome_of_test(run, self._column_name(run.swap.plan), self._runs[0].layers, source)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save and report the quantized models, with the float layers back in the module."""
        if self._tests_a_quantized_file() and self._quantized_start is not None:
            label = str(self._quantized_start.label)
            self.quantized_paths = {label: str(trainer.ckpt_path)}
            self.results = {name: {label: value} for name, value in numbers(trainer.callback_metrics).items()}
        elif self._runs:
            self._save_after_test(trainer, pl_module)

    def _save_after_test(self, trainer: Trainer, module: LightningModule) -> None:
        source = tested_weights(trainer, self._quantized_start.restored if self._quantized_start else None)
        self.float_path = source.path
        outcomes = []
        for run in self._runs:
            with run.swap:
                outcomes.append(self._save(trainer, module, source, self._outcome_of_test(run, source), "test"))
        self._close_test_runs()
        self._report(trainer, outcomes)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo what this callback changed in the module."""
        self._restore_module()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Undo what this callback changed in the module: Lightning calls no teardown after an exception."""
        self._restore_module()
        if (
            isinstance(exception, KeyboardInterrupt)
            and trainer.state.fn == TrainerFn.FITTING
            and self.spec.when == "fit_end"
        ):
            trainer.print(f"TinyQ: the fit was interrupted, so nothing was quantized. {_HOW_TO_QUANTIZE}")

    def _restore_module(self) -> None:
        self._close_test_runs()
        if self._quantized_start is not None:
            self._quantized_start.close()
        self._quantized_start = None

    def _close_test_runs(self) -> None:
        for run in self._runs:
            run.close()
        if self._test_start is not None:
            self._test_start.close()
        self._runs, self._test_start = [], None

    def _tests_a_quantized_file(self) -> bool:
        return self._quantized_start is not None and self._quantized_start.label is not None

    def _column_name(self, plan: Plan) -> str:
        """The name of a plan's column: its label, with a version if an earlier callback of the run uses the label."""
        label = self._label(plan)
        version = self._earlier_labels().count(label)
        return f"{label}-v{version}" if version else label

    def _label(self, plan: Plan) -> str:
        """The plan's label, or with several methods the one asked for, which differs from plan to plan."""
        return plan.spec.method if self.spec.methods else plan.label

    def _earlier_labels(self) -> list[str]:
        """The labels of all plans of the callbacks before this one in the same run."""
        plans = ((each, [*each.plans.values(), *(run.swap.plan for run in each._runs)]) for each in self._earlier)
        return [each._label(plan) for each, theirs in plans for plan in theirs]

    def _save(
        self, trainer: Trainer, module: LightningModule, source: FloatWeights, outcome: Outcome, loop: str
    ) -> Outcome:
        """Write the quantized checkpoint if ``save`` is set; the quantized layers must be in the module."""
        self.plan, self.search = self.plan or outcome.plan, self.search or outcome.search
        if not self.save:
            return outcome
        plan = outcome.plan
        taken = {path for callback in _tinyq_callbacks(trainer) for path in callback.quantized_paths.values()}
        path = quantized_path(self.spec.save, source.folder, source.stem, plan.label, taken)
        content = make_checkpoint(
            source.base, module.state_dict(), plan, outcome.results_as(plan.label), source.sha256, loop
        )
        write_on_rank_zero(trainer, partial(write_checkpoint, content, path))
        self.quantized_paths[outcome.name] = path
        if source.path is None:
            rank_zero_info(f"TinyQ: {source.note}; the quantized checkpoint is {path}")
        return replace(outcome, quantized_path=path)

    def _report(self, trainer: Trainer, outcomes: list[Outcome]) -> None:
        """Set the results, warn if a budget was not met, and show, log and write the report."""
        self.results = combined(outcomes)
        self.plans = {outcome.name: outcome.plan for outcome in outcomes}
        for outcome in outcomes:
            for warning in outcome.warnings():
                rank_zero_warn(f"TinyQ: {outcome.name}: {warning}")
        if self.report:
            show(trainer, outcomes)
            log_tables(trainer, outcomes)
            write_report(trainer, outcomes)


def _tinyq_callbacks(trainer: Trainer) -> list[TinyQCallback]:
    """The TinyQCallbacks of the run, in order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, TinyQCallback)]  # type: ignore[attr-defined]


def _as_tinyq_error(error: Exception, float_path: str | None) -> TinyQError:
    """The error as a TinyQError that says where the float checkpoint is and how to quantize it later."""
    kind = type(error) if isinstance(error, TinyQError) else TinyQError
    told = str(error) if isinstance(error, TinyQError) else f"{type(error).__name__}: {error}"
    where = f"; the float checkpoint is {float_path}" if float_path else ""
    return kind(
        f"Quantizing failed: {told}\nThe training had finished and its results are safe{where}. {_HOW_TO_QUANTIZE}"
    )
