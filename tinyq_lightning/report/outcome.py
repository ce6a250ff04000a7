"""The outcome of one method in a run: its plan, its figures, its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from tinyq_lightning.file import make_checkpoint
from tinyq_lightning.handover import ExportReport
from tinyq_lightning.plan import Coverage, Plan
from tinyq_lightning.search import BatchTimes, LayerError, Search, Stopwatch, loses
from tinyq_lightning.spec import QuantizationSpec
from tinyq_lightning.trainer import (
    FloatWeights,
    Measured,
    MethodsRun,
    QuantizedShards,
    Results,
    TestRun,
    compare,
    with_removed_hyper_parameters,
)

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

__all__ = [
    "Outcome",
    "column_name",
    "combined",
    "log_entries",
    "outcome_of_fit",
    "outcome_of_shards",
    "outcome_of_test",
    "quantized_content",
]


@dataclass(frozen=True)
class Outcome:
    """One method on one model, measured.

    Attributes:
        name: of its column in the tables: the plan's label, or the method asked for if there are several.
        plan: what was quantized.
        coverage: how much of all weights of the model that is.
        results: ``{metric: {"float": …, name: …, "delta": …}}``.
        float_bytes: tensors of the float state dict.
        bytes: tensors of the quantized state dict.
        float_seconds: the time of a batch with float layers; it has no batches if no loop was run.
        seconds: the time of a batch with quantized layers.
        search: the budget's search, or None.
        layers: output errors by layer, if they were measured.
        float_path: the float checkpoint, or None.
        quantized_path: the file, or None if none was written.
        note: where the weights come from.
        exports: what the model was exported in, on rank 0.
        same_as: the name of the outcome before it whose plan it has, and whose file is its own; else None.
        stopwatch: what the run timed for ``never_slower``, or None.
        kept: whether it is saved; not if ``keep: smallest`` chose another method.
    """

    name: str
    plan: Plan
    coverage: Coverage
    results: Results
    float_bytes: int
    bytes: int
    float_seconds: BatchTimes
    seconds: BatchTimes
    search: Search | None = None
    layers: Mapping[str, LayerError] = field(default_factory=dict)
    float_path: str | None = None
    quantized_path: str | None = None
    note: str = ""
    stopwatch: Stopwatch | None = None
    kept: bool = True
    exports: tuple[ExportReport, ...] = ()
    same_as: str | None = None

    def results_as(self, label: str) -> Results:
        """The results under another name than the column's."""
        return _renamed(self.results, self.name, label)

    def verdict(self) -> str | None:
        """Whether the budget was met, or why the method was not kept, in a sentence; None without a budget."""
        budget, found = self.plan.spec.budget, self.search
        if not self.kept:
            return (
                "not saved: keep: smallest keeps the smallest method within the budget, else the one that loses least"
            )
        if budget is None or found is None:
            return None
        others = len(found.trials) - 1
        tried = f"{others} other plan{'s' * (others > 1)} tried" if others else "no other plan tried"
        if found.met:
            how = f"{self._changed(found)}, {tried}" if found.best.changes else "as asked for"
            return f"budget met: {budget.monitor} {loses(found.best)}, {found.allowed:.4g} allowed ({how})"
        stop = f", stopped by {found.stopped_by}" if found.stopped_by else ""
        return (
            f"budget NOT met: {budget.monitor} {loses(found.best)}, {found.best.lost - found.allowed:.4g} more than "
            f"the {found.allowed:.4g} allowed; this is the best plan found ({tried}{stop})"
        )

    def _changed(self, found: Search) -> str:
        """``of 19 layers 2 float, 3 w8a16``: the layers that the search changed, by their method now."""
        counts = Counter(found.best.changes.values())
        return f"of {len(self.plan)} layers " + ", ".join(f"{counts[method]} {method}" for method in sorted(counts))

    @property
    def own_path(self) -> str | None:
        """The file that was written for it; None if there is none, or it has that of another one."""
        return self.quantized_path if self.same_as is None else None

    def shared_file(self) -> str | None:
        """That the method has the file of another one, in a sentence; None if it has its own."""
        if self.same_as is None:
            return None
        return f"layer by layer the same as {self.same_as}, so one file is both"

    def speed_verdict(self) -> str | None:
        """How many layers ``never_slower`` left float, in a sentence; None without it."""
        if self.stopwatch is None:
            return None
        left = sum(decision.decided_by == "timing" for decision in self.plan)
        timed, seconds = len(self.stopwatch.timings), self.stopwatch.seconds
        lost = len(self.stopwatch.not_timed)
        also = f"; {lost} could not be timed" if lost else ""
        return (
            f"never slower: {left} of {len(self.plan)} layers left float ({timed} timings took {seconds:.2g} s{also})"
        )

    def calibration(self) -> str | None:
        """How calibration changed the errors of the layers' outputs, in a sentence; None without it."""
        asked = self.plan.spec.calibrate
        if asked is None:
            return None
        shares = [each.output_error for each in self.plan if each.output_error is not None]
        batches = f"up to {asked.batches} batch{'es' * (asked.batches > 1)}"
        if not shares:
            return f"calibrated on {batches}: no layer could be"
        kept = sum(share < 1 for share in shares)
        return (
            f"calibrated on {batches}: {kept} of {len(self.plan)} layers have other codes or biases; in the median the "
            f"squared error of outputs is {100 * (1 - median(shares)):.0f} % smaller on data that was held out"
        )

    def warnings(self) -> Iterator[str]:
        """Sentences to show as warnings."""
        if self.search is not None and not self.search.met:
            yield str(self.verdict())
        if self.stopwatch and self.plan.is_float:
            yield "every layer is slower quantized than as float here, so never_slower has left all of them float"


def quantized_content(
    module: LightningModule, source: FloatWeights, outcome: Outcome, loop: str
) -> Callable[[], dict[str, Any]]:
    """What makes the content of a quantized checkpoint while the quantized layers are in the module.

    Args:
        module: the user's.
        source: the weights that were quantized.
        outcome: of the method.
        loop: that the metrics are from, ``validate`` or ``test``.
    """

    def content() -> dict[str, Any]:
        results = outcome.results_as(outcome.plan.column_label)
        base = with_removed_hyper_parameters(source.base, module)
        return make_checkpoint(base, module.state_dict(), outcome.plan, results, source.sha256, loop)

    return content


def outcome_of_fit(
    run: MethodsRun, measured: Measured, name: str, layers: Mapping[str, LayerError], source: FloatWeights
) -> Outcome:
    """One method after a fit; not saved yet."""
    before, after = run.before, measured.after
    return Outcome(
        name=name,
        plan=measured.plan,
        coverage=measured.plan.coverage,
        results=compare(before.metrics, after.metrics, name) if before and after else {},
        float_bytes=run.float_bytes,
        bytes=measured.bytes,
        float_seconds=before.seconds_per_batch if before else BatchTimes(),
        seconds=after.seconds_per_batch if after else BatchTimes(),
        search=measured.search,
        layers=layers,
        float_path=source.path,
        note=source.note,
        stopwatch=run.stopwatch,
        kept=measured.kept,
    )


def outcome_of_shards(made: QuantizedShards, name: str, source: FloatWeights) -> Outcome:
    """One method on a sharded model, which has no metrics; not saved yet."""
    return Outcome(
        name=name,
        plan=made.plan,
        coverage=made.plan.coverage,
        results={},
        float_bytes=made.float_bytes,
        bytes=made.bytes,
        float_seconds=BatchTimes(),
        seconds=BatchTimes(),
        float_path=source.path,
        note=source.note,
    )


def outcome_of_test(
    run: TestRun, name: str, layers: Mapping[str, LayerError], source: FloatWeights | None = None
) -> Outcome:
    """One method of a test run; not saved yet."""
    return Outcome(
        name=name,
        plan=run.swap.plan,
        coverage=run.swap.plan.coverage,
        results=_renamed(run.results, run.swap.plan.label, name),
        float_bytes=run.float_bytes,
        bytes=run.bytes,
        float_seconds=run.float_seconds,
        seconds=run.seconds,
        layers=layers,
        float_path=source.path if source else None,
        note=source.note if source else "",
        stopwatch=run.stopwatch,
    )


def _renamed(results: Results, label: str, name: str) -> Results:
    return {
        metric: {name if key == label else key: value for key, value in values.items()}
        for metric, values in results.items()
    }


def column_name(spec: QuantizationSpec, plan: Plan, earlier: Sequence[tuple[QuantizationSpec, Sequence[Plan]]]) -> str:
    """The name of a plan's column: its label, with a version if an earlier callback of the run uses the label.

    Args:
        spec: one method, or several, whose columns have the names of the methods.
        plan: of one method.
        earlier: specs and plans of the callbacks before this one.
    """
    label = _column_label(spec, plan)
    version = [_column_label(each, other) for each, others in earlier for other in others].count(label)
    return f"{label}-v{version}" if version else label


def _column_label(spec: QuantizationSpec, plan: Plan) -> str:
    """The plan's label, or with several methods the one asked for, which differs from plan to plan."""
    return plan.spec.method if spec.methods else plan.column_label


def combined(outcomes: Sequence[Outcome]) -> Results:
    """Results of one method as they are; of several, side by side, with a ``delta/<method>`` for each."""
    return outcomes[0].results if len(outcomes) == 1 else _beside_one_another(outcomes)


def _beside_one_another(outcomes: Sequence[Outcome]) -> Results:
    together: Results = {}
    for outcome in outcomes:
        for metric, values in outcome.results.items():
            row = together.setdefault(metric, {"float": values["float"]})
            row |= {outcome.name: values[outcome.name], f"delta/{outcome.name}": values["delta"]}
    return together


def log_entries(outcomes: Sequence[Outcome], alone: bool = True) -> dict[str, float]:
    """The entries for loggers: ``tinyq/<metric>/float``, ``…/<method>``, ``…/delta``, ``tinyq/size_mb/…``.

    Several methods have ``…/delta/<method>`` each. Sizes are megabytes of 10⁶ bytes of the state dict's
    tensors.

    Args:
        outcomes: of one callback.
        alone: whether no other callback of the run has logged a ``…/delta``.
    """
    values = combined(outcomes) if alone else _beside_one_another(outcomes)
    entries = {f"tinyq/{metric}/{key}": value for metric, row in values.items() for key, value in row.items()}
    sizes = {"float": outcomes[0].float_bytes} | {outcome.name: outcome.bytes for outcome in outcomes}
    return entries | {f"tinyq/size_mb/{key}": size / 1e6 for key, size in sizes.items()}
