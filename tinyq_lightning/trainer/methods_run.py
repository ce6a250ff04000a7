"""After a fit: each method measured with the user's own loop, and brought within the budget where there is one."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from lightning_utilities.core.rank_zero import rank_zero_warn
from tqdm.auto import tqdm

from tinyq_lightning.errors import EvaluationError
from tinyq_lightning.layers import methods_of
from tinyq_lightning.methods import LADDER
from tinyq_lightning.plan import Plan, Swap, state_bytes
from tinyq_lightning.search import (
    SIGNAL_BATCHES,
    Changes,
    LayerError,
    Search,
    Stopwatch,
    evaluation_limit,
    measured_layers,
    search,
)
from tinyq_lightning.spec import Budget, QuantizationSpec
from tinyq_lightning.trainer.calibrating import Calibrator
from tinyq_lightning.trainer.checks import known_mode, refuse_without_validation
from tinyq_lightning.trainer.comparable import best_score, check_comparable
from tinyq_lightning.trainer.evaluation import (
    Evaluation,
    run_evaluation,
    why_no_validation,
)
from tinyq_lightning.trainer.float_weights import FloatWeights
from tinyq_lightning.trainer.inner_trainer import Moment
from tinyq_lightning.trainer.searched import budget_reasons, searched_layers
from tinyq_lightning.trainer.validated import ValidatedWeights

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = [
    "Measured",
    "MethodsRun",
]


@dataclass(frozen=True)
class Measured:
    """One method on one model.

    Attributes:
        method: what was asked for.
        swap: its layers; they are out of the model.
        after: what the validation loop gave with them in; None where there is no loop to run.
        bytes: tensors of the state dict with them in.
        search: what the budget's search did; None without a budget.
        kept: whether it is to be saved.
    """

    method: str
    swap: Swap
    after: Evaluation | None
    bytes: int
    search: Search | None = None
    kept: bool = True

    @property
    def plan(self) -> Plan:
        """The decision for each layer."""
        return self.swap.plan

    @property
    def searched(self) -> bool:
        """Whether a search looked for another plan than the one asked for."""
        return self.search is not None and len(self.search.trials) > 1


class MethodsRun:
    """Measures each method that a spec names; with a budget, brings it within that.

    With ``never_slower``, layers that are slower than float are left float first: that loses no accuracy, and
    the search for a plan within the budget has fewer to decide on. It skips methods that are slower than
    float. Calls are counted while the float model runs. Where that does not show every layer's (torch's
    fused attention and compiled modules call none), they are counted while the model of the first method
    runs, which is measured anew if it changes.

    With ``calibrate``, codes are chosen first, by the same loop's first batches; what is timed and searched has them.

    Making it measures the float model. Wrap it in ``preserved``; the module is float before and after.

    Args:
        trainer: the user's, at the end of a fit.
        module: the user's.
        spec: one method or several.
        source: the weights that the module holds.
        validated: which weights the validations of the fit ran on.

    Attributes:
        before: of the float model; None where there is nothing to compare.
        why_not: why there is nothing to compare, or None.
        float_bytes: tensors of the float state dict.
        stopwatch: what was timed for ``never_slower``; None where nothing is to be.

    Raises:
        EvaluationError: the budget's metric cannot be measured, or ``never_slower`` has no loop to go by.
        SpecError: the budget's metric is not logged, or nothing tells which way it is better.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        spec: QuantizationSpec,
        source: FloatWeights,
        validated: ValidatedWeights,
    ) -> None:
        self._trainer, self._module, self._spec = trainer, module, spec
        self._began = time.monotonic()
        self._moment: Moment | None = None
        self._validated = validated
        why_not = why_no_validation(trainer, module)
        refuse_without_validation(spec, why_not)
        self.stopwatch = Stopwatch() if spec.never_slower else None
        with self._watching_float():
            before = None if why_not else self._evaluate_float(source)
        self.why_not = why_not or (None if before and before.metrics else "validation_step logged no metric")
        self.before = before if before and before.metrics else None
        if before:
            self._warn_of_other_weights(before, source.path)
        self.float_bytes = state_bytes(module.state_dict())
        self._float_value = math.nan
        if spec.budget and before:
            budget = known_mode(spec.budget, before.metrics, before.higher_is_better)
            self._spec = replace(spec, budget=budget)
            self._float_value = before.metrics[budget.monitor]
            if not math.isfinite(self._float_value):
                raise EvaluationError(
                    f"the float model's {budget.monitor} is {self._float_value}, so no loss can be measured from it"
                )

    @property
    def module(self) -> LightningModule:
        """The user's."""
        return self._module

    @cached_property
    def methods(self) -> list[Measured]:
        """Each method, measured and within the budget; with ``keep: smallest`` that holds of the one kept only.

        It is the smallest within the budget, of several as small the one that loses least. Only where
        none is within it does a search begin, from the one that loses least.

        Raises:
            ModelError: a weight cannot be quantized.
        """
        measured = self._as_asked
        budget = self._spec.budget
        if budget is None:
            return measured
        if self._spec.keep == "smallest":
            allowed = budget.allowed(self._float_value)

            def cost(each: Measured) -> tuple[bool, int, float]:
                lost = self._lost(budget, each)
                within = lost <= allowed
                return not within, each.bytes if within else 0, lost

            best = min(measured, key=cost)
            measured = [replace(each, kept=each is best) for each in measured]
        return [self._within_budget(budget, each) if each.kept else each for each in measured]

    @cached_property
    def layers(self) -> dict[str, LayerError]:
        """The output errors of all quantized layers by every method, from the first batches of the loop.

        A loop that fails only when it is measured costs a warning and the layers not reached, not the file.
        """
        swap, *others = self._calibrated
        with measured_layers(swap, *others) as errors, swap.opened():
            try:
                self._evaluate(batches=SIGNAL_BATCHES)
            except EvaluationError as error:
                rank_zero_warn(f"TinyQ: the errors of some layers could not be measured: {error}")
        shared: dict[str, LayerError] = self._trainer.strategy.broadcast(errors)
        return shared

    def _evaluate_float(self, source: FloatWeights) -> Evaluation:
        """In the epoch after the last; once more as in the fit if a schedule has no entry for it, or it logs nothing.

        Of what raises, one process among several that tried again would leave the others waiting. Whether the fit has
        logged more is for rank 0 to say.
        """
        logged = self._validated.logged
        try:
            found = self._evaluate()
        except EvaluationError as error:
            if self._trainer.world_size > 1 or not isinstance(error.__cause__, LookupError):
                raise
            self._moment = source.moment(self._trainer)
            with suppress(EvaluationError):
                return self._evaluate()
            raise
        monitor = self._spec.budget.monitor if self._spec.budget else None
        name = (monitor or "").partition("/dataloader_idx_")[0].removesuffix("_epoch")
        tells_less = name in logged and monitor not in found.metrics if monitor else logged and not found.metrics
        if not self._trainer.strategy.broadcast(bool(tells_less)):
            return found
        self._moment = source.moment(self._trainer)
        try:
            return self._evaluate()
        except EvaluationError:  # which each rank hears of
            self._moment = None
            return found

    def _evaluate(self, batches: int | None = None) -> Evaluation:
        return run_evaluation(self._trainer, self._module, "validate", batches=batches, moment=self._moment)

    def _warn_of_other_weights(self, before: Evaluation, path: str | None) -> None:
        """Warn if the float metrics are not those of the weights that are quantized."""
        if before.other_weights:
            rank_zero_warn(
                f"TinyQ: hooks of {type(self._module).__name__} put other weights in for validation, such as an "
                "average. The float metrics are of those, but the weights of the checkpoint are quantized; load the "
                "others into the module and quantize it to compare like with like"
            )
        elif self._validated.are_others(self._module):
            rank_zero_warn(
                "TinyQ: during training, other weights were put in for validation, such as an average that a callback "
                "keeps, and none of its runs was on the weights that are quantized, so the metrics logged then are of "
                "others. Load those into the module, or have them in the checkpoint, to quantize them"
            )
        elif recorded := best_score(self._trainer, path, before.metrics):
            monitor, score = recorded
            if not math.isclose(before.metrics[monitor], score, rel_tol=0.01, abs_tol=1e-6):
                rank_zero_warn(
                    f"TinyQ: {monitor} of the best checkpoint is {before.metrics[monitor]:.6g}, where ModelCheckpoint "
                    f"recorded {score:.6g}: validation saw other data then, or other weights, such as an average that "
                    "a callback puts in for validation, or the score depends on the epoch, or on training "
                    "batches that the same metric object saw, or is of the weights before, where every_n_train_steps "
                    "saves between two validations. The checkpoint's own weights are quantized"
                )

    @cached_property
    def _swaps(self) -> list[Swap]:
        return [Swap(self._module, spec).or_refuse() for spec in self._spec.each()]

    @cached_property
    def _calibrated(self) -> list[Swap]:
        calibrator = Calibrator(self._trainer, self._module)
        return [calibrator.calibrated(swap, self._moment) for swap in self._swaps]

    @cached_property
    def _as_asked(self) -> list[Measured]:
        measured: dict[Swap, Measured] = {}
        if self.stopwatch and not self._trainer.strategy.broadcast(self.stopwatch.saw_all):
            self.stopwatch.calls.clear()
            first = self._calibrated[0]
            with self.stopwatch.watching(first):
                measured[first] = self._measure(first)
        faster = [self._without_slower(swap) for swap in self._calibrated]
        return [measured.get(swap) or self._measure(swap) for swap in faster]

    def _watching_float(self) -> AbstractContextManager[None]:
        """Count calls while the float model runs, unless hooks would have it take another path than without."""
        if self.stopwatch is None or self._swaps[0].fused:
            return nullcontext()
        return self.stopwatch.watching(self._swaps[0])

    def _without_slower(self, swap: Swap) -> Swap:
        changes = self._slower(swap)
        return swap.switched(changes, "timing") if changes else swap

    def _slower(self, swap: Swap) -> dict[str, tuple[str, str]]:
        """What rank 0 finds slower than float, on every rank."""
        if self.stopwatch is None:
            return {}
        found = self.stopwatch.slower(swap) if self._trainer.is_global_zero else {}
        shared: dict[str, tuple[str, str]] = self._trainer.strategy.broadcast(found)
        return shared

    def _too_slow(self, swap: Swap) -> dict[str, frozenset[str]]:
        """By layer, which of the methods above its own would be slower than float."""
        found: dict[str, set[str]] = defaultdict(set)
        for level, method in enumerate(LADDER[:-1] if self.stopwatch else ()):
            raised = {
                name: (method, "")
                for name, _, layer in swap.pairs()
                if layer.method in LADDER[:level] and method in methods_of(layer)
            }
            for name in self._slower(swap.switched(raised, "timing")) if raised else ():
                found[name].add(method)
        return {name: frozenset(methods) for name, methods in found.items()}

    def _measure(self, swap: Swap) -> Measured:
        with swap:
            runs = self.before or self.stopwatch
            after = self._evaluate() if runs else None
            if self.before and after:
                check_comparable(self._trainer, self.before, after)
            return Measured(swap.plan.spec.method, swap, after, state_bytes(self._module.state_dict()))

    def _lost(self, budget: Budget, measured: Measured) -> float:
        lost = budget.lost(self._float_value, _value(budget, measured))
        return math.inf if math.isnan(lost) else lost

    def _out_of_time(self, budget: Budget) -> bool:
        late = budget.max_seconds is not None and time.monotonic() - self._began >= budget.max_seconds
        return bool(self._trainer.strategy.broadcast(late))

    def _within_budget(self, budget: Budget, asked: Measured) -> Measured:
        exceeds = self._lost(budget, asked) > budget.allowed(self._float_value)
        errors = self.layers if exceeds and not self._out_of_time(budget) else {}
        too_slow = self._too_slow(asked.swap) if exceeds else {}
        layers = searched_layers(asked.swap, errors, too_slow, budget)
        measured = [asked]

        def measure(changes: Changes) -> float:
            swap = asked.swap.switched({name: (method, "budget") for name, method in changes.items()}, "budget")
            measured.append(self._measure(swap))
            bar.update()
            return _value(budget, measured[-1])

        shown = self._trainer.is_global_zero and self._trainer.progress_bar_callback is not None and exceeds
        disable = None if shown else True  # None: unless it goes to a terminal
        with tqdm(
            total=evaluation_limit(len(layers)), initial=2, desc="TinyQ budget", disable=disable, leave=False
        ) as bar:
            found = search(
                layers, budget, self._float_value, _value(budget, asked), measure, lambda: self._out_of_time(budget)
            )
        reasons = budget_reasons(budget, asked.plan, errors, found)
        return replace(measured[found.chosen], swap=asked.swap.switched(reasons, "budget"), search=found)


def _value(budget: Budget, measured: Measured) -> float:
    return math.nan if measured.after is None else measured.after.metrics.get(budget.monitor, math.nan)
