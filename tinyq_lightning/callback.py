"""``TinyQCallback``: a finished run leaves an int8 checkpoint beside the float one, and two honest numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from tinyq_lightning.checkpoint import check_folder, make_checkpoint, quantized_path, save_checkpoint
from tinyq_lightning.errors import SpecError, TinyQError
from tinyq_lightning.evaluation import (
    Results,
    compare,
    numbers,
    refuse_sharding,
    run_validation,
    why_no_validation,
)
from tinyq_lightning.float_weights import FloatWeights, choose_float_weights, tested_weights
from tinyq_lightning.isolation import preserved
from tinyq_lightning.plan import Plan, check_patterns
from tinyq_lightning.quantized_start import QuantizedStart
from tinyq_lightning.replacement import Swap, state_bytes
from tinyq_lightning.report import Outcome, log_entries, log_outcome
from tinyq_lightning.side_by_side import TestRun
from tinyq_lightning.spec import QuantizationSpec, SpecLike, as_spec

__all__ = ["TinyQCallback"]


class TinyQCallback(Callback):
    """Quantizes what a run produced, measures it with the user's own loop, and saves it beside the float file.

    With ``when="fit_end"`` the best checkpoint is quantized when training ends, and the validation loop
    is run on float and on quantized weights. With ``when="test_start"`` a test run tests the quantized
    model, with the float one beside it on the same batches. Either way the module is float again
    afterwards, with the very same layers and weights.

    With either, ``ckpt_path`` of ``test``, ``validate`` and ``predict`` may be a quantized checkpoint.

    Args:
        spec: a method (``w8a32``, ``w8a16``, ``w8a8``), a path to YAML, a mapping, or a QuantizationSpec.
        exclude: patterns of layers to leave float, added to those of the spec.
        when: ``fit_end`` or ``test_start``; over the spec's.
        weights: ``best``, ``last`` or ``current``; over the spec's. Only for ``fit_end``.
        monitor: name of a logged metric: take the checkpoint of the ModelCheckpoint that monitors it.
        mode: ``min`` or ``max``; only together with max_drop.
        max_drop: how much the monitored metric may lose, as a number or a share such as ``1%``.
        save: whether to write the quantized checkpoint.
        dirpath: its folder; by default that of the float checkpoint, or ``default_root_dir``.
        filename: its name; by default ``<method>-<float stem>.ckpt``.
        report: whether to print the comparison.

    Attributes:
        quantized_path: of the file that was written, or None.
        float_path: of the checkpoint that was quantized, or None.
        plan: the decision for each layer, or None before a run.
        results: ``{"val_acc": {"float": …, "w8a32": …, "delta": …}}``; empty before a run.

    Raises:
        SpecError: the spec or an argument is wrong.
    """

    def __init__(
        self,
        spec: SpecLike = "w8a32",
        *,
        exclude: Sequence[str] = (),
        when: Literal["fit_end", "test_start"] | None = None,
        weights: Literal["best", "last", "current"] | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
        max_drop: float | str | None = None,
        save: bool = True,
        dirpath: str | None = None,
        filename: str | None = None,
        report: bool = True,
    ) -> None:
        self.spec = _with_arguments(as_spec(spec), exclude, when, weights, dirpath, filename)
        self.monitor, self.save, self.report = monitor, save, report
        if max_drop is not None or mode is not None or self.spec.budget is not None:
            raise SpecError("budgets (max_drop, mode, `budget:`) are not part of this version: leave them out")
        self._start: QuantizedStart | None = None
        self._run: TestRun | None = None
        self._begin()

    def _begin(self) -> None:
        self.quantized_path: str | None = None
        self.float_path: str | None = None
        self.plan: Plan | None = None
        self.results: Results = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work; from here on ``ckpt_path`` may be a quantized file."""
        refuse_sharding(trainer)
        self._start = QuantizedStart(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What cannot end well is better known now than after the training."""
        if self.spec.when == "fit_end":
            check_patterns(self.spec, pl_module)
            check_folder(self.spec)

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
        why_not = why_no_validation(trainer, module)
        with preserved(module, weights=source.path is not None):
            source.load_into(trainer, module)
            before = {} if why_not else run_validation(trainer, module)
            swap = Swap(module, self.spec)
            self.plan, float_bytes = swap.plan, state_bytes(module.state_dict())
            with swap:
                after = run_validation(trainer, module) if before else {}
                self.results = trainer.strategy.broadcast(compare(before, after, self.plan.label))
                outcome = self._save(trainer, module, source, float_bytes, "validate")
        if not before:
            rank_zero_warn(f"TinyQ: quantized without a comparison: {why_not or 'validation_step logged no metric'}")
        log_outcome(trainer, outcome)
        self._tell(trainer, outcome)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the quantized layers in: they are what the Trainer tests, with the float ones beside."""
        if self.spec.when != "test_start" or self._tests_a_quantized_file():
            return
        self._begin()
        first = next((callback._run for callback in _ours(trainer) if callback._run is not None), None)
        self._run = TestRun(trainer, pl_module, self.spec, first, self._log_results)
        self.plan = self._run.swap.plan

    def on_test_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Have the float step draw the same random numbers as the quantized one."""
        if self._run is not None:
            self._run.before_batch()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Run the same batch through the float model."""
        if self._run is not None:
            self._run.after_batch(batch, batch_idx, dataloader_idx)

    def _log_results(self, run: TestRun) -> None:
        self.results = run.results
        run.log(log_entries(run.swap.plan.label, run.results, run.float_bytes, run.bytes))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the quantized model; float layers back."""
        if self._tests_a_quantized_file() and self._start is not None:
            self.quantized_path = str(trainer.ckpt_path)
            tested = numbers(trainer.callback_metrics)
            self.results = {name: {str(self._start.label): value} for name, value in tested.items()}
        elif self._run is not None:
            run = self._run
            source = tested_weights(trainer, self._start.restored if self._start else None)
            self.float_path = source.path
            with run.swap:
                outcome = self._save(trainer, pl_module, source, run.float_bytes, "test")
            run.close()
            self._run = None
            self._tell(trainer, outcome)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The module as it was."""
        self._let_go()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The module as it was, since Lightning calls no teardown after an exception."""
        self._let_go()

    def _let_go(self) -> None:
        if self._run is not None:
            self._run.close()
        if self._start is not None:
            self._start.close()
        self._run = self._start = None

    def _tests_a_quantized_file(self) -> bool:
        return self._start is not None and self._start.label is not None

    def _save(
        self, trainer: Trainer, module: LightningModule, source: FloatWeights, float_bytes: int, loop: str
    ) -> Outcome:
        """Write the file, unless it is not wanted; the module holds its quantized layers."""
        assert self.plan is not None
        state_dict = module.state_dict()
        if self.save:
            taken = {callback.quantized_path for callback in _ours(trainer)}
            path = quantized_path(self.spec.save, source.folder, source.stem, self.plan.label, taken)
            content = make_checkpoint(source.base, state_dict, self.plan, self.results, source.sha256, loop)
            save_checkpoint(trainer, content, path)
            self.quantized_path = path
            if source.path is None:
                rank_zero_info(f"TinyQ: {source.note}; the quantized checkpoint is {path}")
        return Outcome(
            self.plan,
            self.results,
            float_bytes,
            state_bytes(state_dict),
            source.path,
            self.quantized_path,
            source.note,
        )

    def _tell(self, trainer: Trainer, outcome: Outcome) -> None:
        if self.report:
            trainer.print(f"\n{outcome.table()}\n")


def _ours(trainer: Trainer) -> list[TinyQCallback]:
    """All callbacks of this kind in the run; there may be one for each method."""
    return [callback for callback in trainer.callbacks if isinstance(callback, TinyQCallback)]  # type: ignore[attr-defined]


def _with_arguments(
    spec: QuantizationSpec,
    exclude: Sequence[str],
    when: Any,
    weights: Any,
    dirpath: str | None,
    filename: str | None,
) -> QuantizationSpec:
    """The spec with what was given as arguments; they are read as the YAML is, and refused as it is."""
    if isinstance(exclude, str):
        raise SpecError(f"exclude must be a list of patterns, not the text {exclude!r}: write [{exclude!r}]")
    given = {"when": when, "weights": weights}
    content = spec.to_dict() | {name: value for name, value in given.items() if value is not None}
    content["exclude"] = [*content["exclude"], *exclude]
    save = {"dirpath": dirpath, "filename": filename}
    content["save"] = content["save"] | {name: str(value) for name, value in save.items() if value is not None}
    return replace(QuantizationSpec.from_dict(content), origin=spec.origin)


def _training_is_safe(error: Exception, float_path: str | None) -> TinyQError:
    """The error as one of ours, with the word that nothing of the training is lost."""
    kind = type(error) if isinstance(error, TinyQError) else TinyQError
    told = str(error) if isinstance(error, TinyQError) else f"{type(error).__name__}: {error}"
    where = f"; the float checkpoint is {float_path}" if float_path else ""
    again = (
        "TinyQCallback(..., when='test_start') with Trainer.test(model, ckpt_path=...) quantizes it without training"
    )
    return kind(f"Quantizing failed: {told}\nThe training had finished and its results are safe{where}. {again}.")
