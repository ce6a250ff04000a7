"""The outcome of one method in a run: its plan, its figures, its files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tinyq_lightning.handover import ExportReport
from tinyq_lightning.plan import Coverage, Plan
from tinyq_lightning.search import BatchTimes, LayerError, Search, Stopwatch, loses
from tinyq_lightning.trainer import FloatWeights, Measured, MethodsRun, Results, TestRun, compare

__all__ = [
    "Outcome",
    "combined",
    "log_entries",
    "outcome_of_fit",
    "outcome_of_test",
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
        stopwatch: what the run timed for ``never_slower``, or None.
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
    exports: tuple[ExportReport, ...] = ()

    def results_as(self, label: str) -> Results:
        """The results under another name than the column's."""
        return _renamed(self.results, self.name, label)

    def verdict(self) -> str | None:
        """Whether the budget was met, in a sentence; None without a budget."""
        budget, found = self.plan.spec.budget, self.search
        if budget is None or found is None:
            return None
        tried = f"{len(found.trials)} plan{'s' * (len(found.trials) > 1)} measured"
        changed = len(found.best.changes)
        if found.met:
            how = f"{changed} of {len(self.plan)} layers given up" if changed else "as asked for"
            return f"budget met: {budget.monitor} {loses(found.best)}, {found.allowed:.4g} allowed ({how}, {tried})"
        stop = f", stopped by {found.stopped_by}" if found.stopped_by else ""
        return (
            f"budget NOT met: {budget.monitor} {loses(found.best)}, {found.best.lost - found.allowed:.4g} more than "
            f"the {found.allowed:.4g} allowed; this is the best plan found ({tried}{stop})"
        )

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

    def warnings(self) -> Iterator[str]:
        """Sentences to show as warnings."""
        if self.search is not None and not self.search.met:
            yield str(self.verdict())
        if self.stopwatch and all(decision.method == "float" for decision in self.plan):
            yield "int8 is slower than float here in every layer, so never_slower has left all of them float"


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
