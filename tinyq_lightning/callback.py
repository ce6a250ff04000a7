"""``TinyQCallback``: a finished run leaves an int8 checkpoint beside the float one, and two honest numbers."""

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
    check_monitor,
    choose_float_weights,
    directions,
    known_mode,
    note_test_start,
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

_AGAIN = "TinyQCallback(..., when='test_start') with Trainer.test(model, ckpt_path=...) quantizes a float checkpoint."


_ONLY_LATER = ". This was the sanity check: where the metric is logged only after it, set num_sanity_val_steps=0"


class TinyQCallback(Callback):
    """Quantizes what a run produced, measures it with the user's own loop, and saves it beside the float file.

    With ``when="fit_end"`` the best checkpoint is quantized when training ends, and the validation loop
    is run on float and on quantized weights. With ``when="test_start"`` a test run tests the quantized
    model, with the float one beside it on the same batches. Either way the module is float again
    afterwards, with the very same layers and weights.

    With ``monitor`` and ``max_drop``, layers are given up until the metric loses no more than that, as few and
    as cheaply as a search finds; see :func:`tinyq_lightning.search.budget.search`. Where no plan is within the
    budget, the best one found is saved, with a warning.

    Several methods are measured side by side, the float model once, and a file is saved for each.

    With either, ``ckpt_path`` of ``test``, ``validate`` and ``predict`` may be a quantized checkpoint.

    Args:
        spec: a method (``w8a32``, ``w8a16``, ``w8a8``), a list of them, a path to YAML, a mapping, or a
            QuantizationSpec.
        exclude: patterns of layers to leave float, added to those of the spec.
        when: ``fit_end`` or ``test_start``; over the spec's.
        weights: ``best``, ``last`` or ``current``; over the spec's. Only for ``fit_end``.
        monitor: name of a metric that validation logs: the budget's and, for ``weights``, the metric of the
            ModelCheckpoint to take them from.
        mode: ``max`` where more is better, ``min`` where less is; needed with max_drop where the metric is not
            logged as a torchmetrics object that tells.
        max_drop: how much the metric may lose, in its unit or as a share of the float value such as ``1%``.
        keep: of several methods: ``all``, or with a budget the ``smallest`` within it (of several as small,
            the one that loses least); over the spec's.
        never_slower: whether to time the layers as the evaluation calls them, and to leave float those that int8
            makes slower on this machine; over the spec's.
        save: whether to write the quantized checkpoint.
        dirpath: its folder; by default that of the float checkpoint, or ``default_root_dir``.
        filename: its name; by default ``<method>-<float stem>.ckpt``.
        report: whether to print the comparison and the layers, give them to the loggers that take tables or
            text, and write ``.json``, ``.html`` and ``.yaml`` (the plan as a spec) beside the quantized
            checkpoint. ``full`` adds each layer's output SQNR, crest factor and time, from a few batches.

    Attributes:
        quantized_path: of the file that was written, of the first among several, or None.
        quantized_paths: of each file that was written, by method.
        float_path: of the checkpoint that was quantized, or None.
        plan: the decision for each layer, of the first that was saved among several methods; None before a run.
        plans: the plan of each method.
        results: ``{"val_acc": {"float": …, "w8a32": …, "delta": …}}``, or with several methods
            ``{"val_acc": {"float": …, "w8a32": …, "delta/w8a32": …, "w8a8": …, "delta/w8a8": …}}``. The key is
            the plan's label (``mixed`` where it mixes methods); among several, the method asked for. Empty
            before a run.
        search: what the budget's search measured and chose, of the plan saved; None without a budget.

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
        self._start: QuantizedStart | None = None
        self._runs: list[TestRun] = []
        self._earlier: list[TinyQCallback] = []
        self._begin()

    def _begin(self) -> None:
        self.quantized_paths: dict[str, str] = {}
        self.float_path: str | None = None
        self.plan: Plan | None = None
        self.plans: dict[str, Plan] = {}
        self.results: Results = {}
        self.search: Search | None = None

    @property
    def quantized_path(self) -> str | None:
        """Of the file that was written, of the first among several, or None."""
        return next(iter(self.quantized_paths.values()), None)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work; from here on ``ckpt_path`` may be a quantized file."""
        refuse_sharding(trainer)
        earlier = takewhile(lambda each: each is not self, _ours(trainer))
        self._earlier = [each for each in earlier if each.spec.when == self.spec.when]
        self._start = QuantizedStart(trainer, pl_module)
        if stage == "test" and self.spec.when == "test_start":
            note_test_start(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What cannot end well is better known now than after the training."""
        if self.spec.when == "fit_end":
            for spec in self.spec.each():
                check_patterns(spec, pl_module)
            check_folder(self.spec)
            if self.spec.weights != "current" and self.spec.budget is None:
                check_monitor(trainer, self.monitor)
            refuse_without_validation(self.spec, why_never_validated(trainer, pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first validation, which is the sanity check before training, shows whether the budget fits the metric."""
        budget, logged = self.spec.budget, trainer.callback_metrics
        fits = trainer.state.fn == TrainerFn.FITTING and self.spec.when == "fit_end"
        sanity = trainer.sanity_checking and logged  # one that logs nothing tells nothing of the loops to come
        if budget and fits and (sanity or budget.monitor in logged):
            known_mode(budget, logged, directions(trainer), _ONLY_LATER if sanity else "")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize, evaluate float and int8, save, log, report; leave everything as it was."""
        if self.spec.when != "fit_end":
            return
        self._begin()
        try:
            self._quantize_after_fit(trainer, pl_module)
        except Exception as error:
            raise _training_is_safe(error, self.float_path) from error

    def _quantize_after_fit(self, trainer: Trainer, module: LightningModule) -> None:
        source = choose_float_weights(trainer, self.spec.weights, self.monitor)
        self.float_path = source.path
        outcomes = []
        with preserved(module, weights=source.path is not None):
            source.load_into(trainer, module)
            run = MethodsRun(trainer, module, self.spec, why_no_validation(trainer, module))
            for measured in run.methods:
                layers = run.layers if measured.searched or (self.report == "full" and run.before) else {}
                outcome = outcome_of_fit(run, measured, self._name(measured.plan), layers, source)
                if measured.kept:
                    with measured.swap:
                        outcome = self._save(trainer, module, source, outcome, "validate")
                outcomes.append(outcome)
        if run.why_not:
            rank_zero_warn(f"TinyQ: quantized without a comparison: {run.why_not}")
        log_outcomes(trainer, outcomes, alone=not self._earlier)
        self._tell(trainer, outcomes)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the quantized layers in: they are what the Trainer tests, with the float ones beside."""
        if self.spec.when != "test_start" or self._tests_a_quantized_file():
            return
        self._begin()
        first = next((run for callback in _ours(trainer) for run in callback._runs), None)
        stopwatch = Stopwatch() if self.spec.never_slower else None
        for spec in self.spec.each():
            self._runs.append(TestRun(trainer, pl_module, spec, first, self._log_results, stopwatch))
            first = first or self._runs[0]
        if self.report == "full":
            self._runs[0].watch_layers()

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """The Trainer's own step is about to begin."""
        for run in self._runs:
            run.before_batch(*args, **kwargs)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """The Trainer's own step has ended; the other models are tested at the end of the epoch."""
        for run in self._runs:
            run.after_batch(*args, **kwargs)

    def _log_results(self, run: TestRun) -> None:
        if run is self._runs[-1]:
            run.log(log_entries([self._outcome_of_test(each) for each in self._runs], alone=not self._earlier))

    def _outcome_of_test(self, run: TestRun, source: FloatWeights | None = None) -> Outcome:
        return outcome_of_test(run, self._name(run.swap.plan), self._runs[0].layers, source)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the quantized model; float layers back."""
        if self._tests_a_quantized_file() and self._start is not None:
            label = str(self._start.label)
            self.quantized_paths = {label: str(trainer.ckpt_path)}
            self.results = {name: {label: value} for name, value in numbers(trainer.callback_metrics).items()}
        elif self._runs:
            self._finish_test(trainer, pl_module)

    def _finish_test(self, trainer: Trainer, module: LightningModule) -> None:
        source = tested_weights(trainer, self._start.restored if self._start else None)
        self.float_path = source.path
        outcomes = []
        for run in self._runs:
            with run.swap:
                outcomes.append(self._save(trainer, module, source, self._outcome_of_test(run, source), "test"))
        self._let_go_of_runs()
        self._tell(trainer, outcomes)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The module as it was."""
        self._let_go()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The module as it was, since Lightning calls no teardown after an exception."""
        self._let_go()
        if (
            isinstance(exception, KeyboardInterrupt)
            and trainer.state.fn == TrainerFn.FITTING
            and self.spec.when == "fit_end"
        ):
            trainer.print(f"TinyQ: the fit was interrupted, so nothing was quantized. {_AGAIN}")

    def _let_go(self) -> None:
        self._let_go_of_runs()
        if self._start is not None:
            self._start.close()
        self._start = None

    def _let_go_of_runs(self) -> None:
        for run in self._runs:
            run.close()
        self._runs = []

    def _tests_a_quantized_file(self) -> bool:
        return self._start is not None and self._start.label is not None

    def _name(self, plan: Plan) -> str:
        """Of a method's figures; versioned, as a file's name is, where an earlier callback of the run has it."""
        label = self._label(plan)
        version = self._labels_before().count(label)
        return f"{label}-v{version}" if version else label

    def _label(self, plan: Plan) -> str:
        """Among several methods, what was asked for tells them apart."""
        return plan.spec.method if self.spec.methods else plan.label

    def _labels_before(self) -> list[str]:
        """Of all that the callbacks before this one quantize in the same run."""
        plans = ((each, [*each.plans.values(), *(run.swap.plan for run in each._runs)]) for each in self._earlier)
        return [each._label(plan) for each, theirs in plans for plan in theirs]

    def _save(
        self, trainer: Trainer, module: LightningModule, source: FloatWeights, outcome: Outcome, loop: str
    ) -> Outcome:
        """Write the file, unless it is not wanted; the module holds its quantized layers."""
        self.plan, self.search = self.plan or outcome.plan, self.search or outcome.search
        if not self.save:
            return outcome
        plan = outcome.plan
        taken = {path for callback in _ours(trainer) for path in callback.quantized_paths.values()}
        path = quantized_path(self.spec.save, source.folder, source.stem, plan.label, taken)
        content = make_checkpoint(
            source.base, module.state_dict(), plan, outcome.results_as(plan.label), source.sha256, loop
        )
        write_on_rank_zero(trainer, partial(write_checkpoint, content, path))
        self.quantized_paths[outcome.name] = path
        if source.path is None:
            rank_zero_info(f"TinyQ: {source.note}; the quantized checkpoint is {path}")
        return replace(outcome, quantized_path=path)

    def _tell(self, trainer: Trainer, outcomes: list[Outcome]) -> None:
        """Results to who asks for them, the report to who wants one, and a warning where a budget was not met."""
        self.results = combined(outcomes)
        self.plans = {outcome.name: outcome.plan for outcome in outcomes}
        for outcome in outcomes:
            for warning in outcome.warnings():
                rank_zero_warn(f"TinyQ: {outcome.name}: {warning}")
        if self.report:
            show(trainer, outcomes)
            log_tables(trainer, outcomes)
            write_report(trainer, outcomes)


def _ours(trainer: Trainer) -> list[TinyQCallback]:
    """All callbacks of this kind in the run; there may be one for each method."""
    return [callback for callback in trainer.callbacks if isinstance(callback, TinyQCallback)]  # type: ignore[attr-defined]


def _training_is_safe(error: Exception, float_path: str | None) -> TinyQError:
    """The error as one of ours, with the word that nothing of the training is lost."""
    kind = type(error) if isinstance(error, TinyQError) else TinyQError
    told = str(error) if isinstance(error, TinyQError) else f"{type(error).__name__}: {error}"
    where = f"; the float checkpoint is {float_path}" if float_path else ""
    return kind(f"Quantizing failed: {told}\nThe training had finished and its results are safe{where}. {_AGAIN}")
