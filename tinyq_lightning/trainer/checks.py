"""Checks before training starts, and of the metric that a budget names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.parameter import is_lazy

from tinyq_lightning.errors import EvaluationError, ModelError, SpecError, quoted
from tinyq_lightning.file import (
    check_folder,
    check_state,
    quantized_paths,
    refuse_foreign,
    typed_entries,
    why_not_writable,
)
from tinyq_lightning.namespaces import derives_from, is_overridden, namespace_of, refuse_other_namespace
from tinyq_lightning.plan import check_model, sites_for, weights_of, why_stays_float
from tinyq_lightning.spec import Budget, Mode, QuantizationSpec, nearest, wanted_method
from tinyq_lightning.trainer.hyper_parameters import hyper_parameters_of
from tinyq_lightning.trainer.ranks import write_on_rank_zero
from tinyq_lightning.trainer.results import directions, logged_names

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

__all__ = [
    "check_before_fit",
    "check_budget",
    "check_monitor",
    "checkpoint_callbacks",
    "known_mode",
    "logged_per_dataloader",
    "preferred_keepers",
    "refuse_mixed_packages",
    "refuse_without_validation",
    "warn_of_no_limit",
    "warn_of_worst_checkpoint",
    "why_never_validated",
]


_SANITY_CHECK_ADVICE = ". This was the sanity check: if the metric is logged only later, set num_sanity_val_steps=0"


def check_before_fit(
    trainer: Trainer, module: LightningModule, spec: QuantizationSpec, monitor: str | None, save: bool
) -> list[str]:
    """Refuse before training what could not be quantized, measured or saved after it.

    Args:
        trainer: in ``on_fit_start``.
        module: the user's.
        spec: one method or several.
        monitor: metric that selects a ModelCheckpoint, or None.
        save: whether a file is to be written.

    Returns:
        The hyper-parameters that the file cannot hold, by their names in the file; a warning has told of them.

    Raises:
        SpecError: a pattern or ``monitor`` names nothing, the budget's ``mode`` is that of no ModelCheckpoint, or the
            folder cannot be written to.
        ModelError: there is nothing to quantize, the module's state dict leaves out a layer, or hyper-parameters
            cannot be resolved.
        EvaluationError: a metric is needed that cannot be measured.
    """
    for each in spec.each():
        check_model(each, module)
    if spec.weights != "current" and spec.budget is None:
        check_monitor(trainer, monitor)
    if spec.budget is not None:
        check_direction(trainer, spec.budget)
    refuse_without_validation(spec, why_never_validated(trainer, module))
    if save and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        check_folder(spec)
        state_dict = module.state_dict()
        check_state(state_dict)
        for each in spec.each():
            _refuse_missing_weights(each, module, state_dict)
        write_on_rank_zero(trainer, partial(_check_target, trainer, spec))
        return _check_hyper_parameters(trainer, module)
    return []


def _refuse_missing_weights(spec: QuantizationSpec, module: LightningModule, state_dict: Mapping[str, Any]) -> None:
    """Raise ModelError if a layer to be quantized has no entry in the state dict that a file would hold."""
    saved = {_memory(value) for value in state_dict.values() if isinstance(value, Tensor)} - {None}
    if saved.isdisjoint(_memory(parameter) for parameter in module.parameters()):
        return  # a state dict of copies tells nothing
    missing = []
    for site in sites_for(spec, module):
        quantized = wanted_method(spec, site.names).method != "float" and why_stays_float(site) is None
        weights = [list(weights_of(*place)) for place in site.weights.values()] if quantized else []
        places = [{_memory(tensor) for tensor, _ in found} - {None} for found in weights]
        if any(each and saved.isdisjoint(each) for each in places):
            missing.append(site.name)
    if missing:
        raise ModelError(
            f"state_dict() of {type(module).__name__} leaves out {', '.join(missing)}, so a quantized file would lack "
            "the weights: exclude these layers, have state_dict() return them, or give save=False"
        )


def _memory(tensor: Tensor) -> int | None:
    """What tells whether two tensors share memory; None for one without any."""
    if is_lazy(tensor) or tensor.layout != torch.strided:
        return None
    return cast(int, tensor.untyped_storage()._cdata)


def _check_target(trainer: Trainer, spec: QuantizationSpec) -> None:
    """Refuse a folder that takes no files, and a file name of the spec that another kind of file has."""
    _check_writable(trainer, spec)
    _check_named(trainer, spec)


def _check_writable(trainer: Trainer, spec: QuantizationSpec) -> None:
    """Write a small file to the folder of the quantized checkpoint, if that folder is known before training."""
    folder, source = spec.save.dirpath, f"{spec.origin.where('save', 'dirpath')}: dirpath"
    if folder is None:
        if checkpoint_callbacks(trainer):
            return  # the folder is that of a ModelCheckpoint, which has to write there as well
        folder, source = trainer.default_root_dir, "default_root_dir"
    if why_not := why_not_writable(folder):
        raise SpecError(
            f"{source} {os.fspath(folder)!r} cannot be written to, so the quantized checkpoint could not be saved "
            f"after training: {why_not}. Choose another dirpath, or save=False"
        )


def _check_named(trainer: Trainer, spec: QuantizationSpec) -> None:
    """Refuse a file name of the spec that another kind of file has, if its folder is known before training."""
    if spec.save.filename is None:
        return
    folders = {os.fspath(each.dirpath or "") for each in checkpoint_callbacks(trainer)} or {trainer.default_root_dir}
    folder = spec.save.dirpath or (folders.pop() if len(folders) == 1 else "")
    if folder:  # of several it is that of the weights which will be chosen
        refuse_foreign(next(quantized_paths(spec.save, os.fspath(folder), "", "")))


def _check_hyper_parameters(trainer: Trainer, module: LightningModule) -> list[str]:
    """Warn about hyper-parameters that the quantized file cannot hold, and return their names in it.

    Raises:
        ModelError: they cannot be resolved.
    """
    told: list[str] = []
    owners = {"hyper_parameters": module, "datamodule_hyper_parameters": trainer.datamodule}  # type: ignore[attr-defined]
    for entry, owner in owners.items():
        name, dropped = type(owner).__name__, list[str]()
        try:
            typed_entries({} if owner is None else hyper_parameters_of(owner), entry, dropped, [])
        except Exception as error:  # of OmegaConf, or of a value's own class
            raise ModelError(
                f"the hyper-parameters of {name} cannot be resolved, so no checkpoint could hold them: {quoted(error)}"
            ) from error
        if dropped:
            names = ", ".join(name + each.removeprefix(entry) for each in dropped)
            rank_zero_warn(
                f"TinyQ: the quantized checkpoint holds plain data only, so it will not have these hyper-parameters: "
                f"{names}. Pass them as init arguments when loading it, or keep them out of "
                "save_hyperparameters(ignore=[...])"
            )
        told += dropped
    return told


def refuse_mixed_packages(trainer: Trainer) -> None:
    """Refuse a data module and callbacks of the other package, which the Trainer would not know for what they are.

    Callbacks of the user's own and loggers may be of either: the Trainer only calls their methods.

    Raises:
        TrainerError: there is one; the error says what to import instead.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    known = [each for each in callbacks if derives_from(type(each), "Checkpoint", "ModelSummary", "ProgressBar")]
    loop: Any = getattr(trainer, f"{trainer.state.fn.value}_loop") if trainer.state.fn else None
    given = loop and loop._data_source.instance  # where a data module is that stands for the dataloaders
    refuse_other_namespace(trainer, trainer.datamodule, given, *known)  # type: ignore[attr-defined]


def why_never_validated(trainer: Trainer, module: LightningModule) -> str | None:
    """As :func:`why_no_validation`, for use before the dataloaders exist."""
    if not is_overridden("validation_step", module):
        return f"{type(module).__name__} has no validation_step"
    if trainer.limit_val_batches == 0:
        return "limit_val_batches is 0"
    return None


def refuse_without_validation(spec: QuantizationSpec, why_not: str | None) -> None:
    """Refuse a spec that needs the validation loop if that cannot be run.

    Args:
        spec: what the user asked for.
        why_not: why the validation loop cannot be run, or None.

    Raises:
        EvaluationError: ``why_not`` is given, and the spec has a budget, ``never_slower``, ``calibrate`` or an
            export with static activations.
    """
    if spec.budget and why_not:
        raise EvaluationError(f"the budget's metric {spec.budget.monitor!r} cannot be measured: {why_not}")
    if spec.never_slower and why_not:
        raise EvaluationError(f"never_slower times layers at the row counts of the validation loop, but {why_not}")
    if spec.calibrate and why_not:
        raise EvaluationError(f"calibrate chooses codes by the batches of the validation loop, but {why_not}")
    if why_not and any(each.is_static for each in spec.export):
        raise EvaluationError(f"static activations take their ranges from the validation loop, but {why_not}")


def known_mode(
    budget: Budget, names: Mapping[str, object], higher_is_better: Mapping[str, bool], advice: str = ""
) -> Budget:
    """The budget with its mode, which the logged metric decides unless the spec gives it.

    Args:
        budget: as the spec has it.
        names: the logged metrics by name.
        higher_is_better: by name, for metrics logged as torchmetrics objects that know it.
        advice: appended to the error about a metric that was not logged.

    Raises:
        SpecError: the metric was not logged, or its mode is unknown.
    """
    monitor = budget.monitor
    if monitor not in names:
        meant = _meant(monitor, names)
        logged = ", ".join(sorted(name for name in names if not name.startswith("tinyq/"))) or "nothing"
        raise SpecError(f"budget: validation logs no metric {monitor!r}.{meant} It logs: {logged}{advice}")
    if budget.mode is not None:
        if monitor in higher_is_better and (budget.mode == "max") != higher_is_better[monitor]:
            raise SpecError(
                f"budget: mode={budget.mode!r} contradicts the metric: {monitor!r} is the value of a torchmetrics "
                f"object with higher_is_better={higher_is_better[monitor]}. Leave mode out, or log the value that you "
                "mean"
            )
        return budget
    if monitor not in higher_is_better:
        raise SpecError(
            f"budget: mode is needed, since {monitor!r} is not logged as a torchmetrics object that tells it: "
            "mode='max' where higher is better, mode='min' where lower is"
        )
    mode: Mode = "max" if higher_is_better[monitor] else "min"
    return replace(budget, mode=mode)


def check_budget(trainer: Trainer, budget: Budget) -> None:
    """Check a budget against the metrics of a validation in ``fit``; the first is the sanity check before training.

    A sanity check that logs nothing shows nothing, and a later validation may log other metrics than the next.

    Raises:
        SpecError: the metric was not logged, or its mode is unknown or contradicted.
    """
    logged = logged_names(trainer)
    sanity = trainer.sanity_checking and bool(logged)
    if sanity or budget.monitor in logged or logged_per_dataloader(budget.monitor, logged):
        advice = _SANITY_CHECK_ADVICE if sanity else ""
        known = known_mode(budget, dict.fromkeys(logged), directions(trainer), advice)
        check_direction(trainer, known, by_metric=budget.mode is None)


def warn_of_worst_checkpoint(trainer: Trainer, monitor: str | None, told: set[str]) -> None:
    """Warn if the ModelCheckpoint that is looked at keeps the worst, by what the logged torchmetrics object tells.

    Args:
        trainer: at the end of a validation in ``fit``.
        monitor: as of :func:`preferred_keepers`.
        told: metrics that a warning has named; others are added.
    """
    better, keepers = directions(trainer), preferred_keepers(trainer, monitor)
    name = keepers[0].monitor if keepers else None
    if name is None or name in told or name not in better or (keepers[0].mode == "max") == better[name]:
        return
    told.add(name)
    rank_zero_warn(
        f"TinyQ: ModelCheckpoint(monitor={name!r}, mode={keepers[0].mode!r}) keeps the worst checkpoint as the best, "
        f"and that one is quantized: {name!r} is logged as a torchmetrics object with higher_is_better={better[name]} "
        "(a ModelCheckpoint without a mode takes 'min')"
    )


def warn_of_no_limit(trainer: Trainer, budget: Budget, told: set[str]) -> None:
    """Warn if a metric that lies between 0 and 1, of which more is better, may lose 1 or more.

    Args:
        trainer: at the end of a validation in ``fit``.
        budget: of the spec.
        told: metrics that a warning has named; this one is added.
    """
    name, value = budget.monitor, trainer.callback_metrics.get(budget.monitor)
    grows = budget.mode == "max" or directions(trainer).get(name)
    if trainer.sanity_checking or value is None or name in told or not grows:
        return
    if budget.allowed(1.0) < 1 or not 0 <= float(value) <= 1:
        return
    told.add(name)
    rank_zero_warn(
        f"TinyQ: max_drop={budget.max_drop!r} limits nothing where {name!r} lies between 0 and 1, as "
        f"{float(value):.3g} does: max_drop=0.01 is one point of a hundred, max_drop='1%' one percent of the float "
        "value"
    )


def preferred_keepers(trainer: Trainer, monitor: str | None) -> list[ModelCheckpoint]:
    """The ModelCheckpoints of the run; those that monitor ``monitor`` come first, if it is given."""
    return sorted(checkpoint_callbacks(trainer), key=lambda keeper: monitor is not None and keeper.monitor != monitor)


def check_monitor(trainer: Trainer, monitor: str | None) -> None:
    """Refuse a ``monitor`` that selects none of the ModelCheckpoints; warn of one that none of them looks at.

    Raises:
        SpecError: ModelCheckpoints monitor metrics, but none of them monitors this one.
    """
    monitored = [keeper.monitor for keeper in checkpoint_callbacks(trainer) if keeper.monitor is not None]
    if monitor is not None and monitored and monitor not in monitored:
        raise SpecError(
            f"monitor: no ModelCheckpoint monitors {monitor!r}.{_meant(monitor, monitored)} "
            f"Monitored: {', '.join(monitored)}"
        )
    if monitor is not None and not monitored:
        rank_zero_warn(
            f"TinyQ: monitor={monitor!r} is not used: it chooses among ModelCheckpoints, and none monitors a metric. "
            f"Add ModelCheckpoint(monitor={monitor!r}, mode=...), or max_drop= for a budget"
        )


def check_direction(trainer: Trainer, budget: Budget, by_metric: bool = False) -> None:
    """Refuse a budget for which another direction is better than for the ModelCheckpoints of its metric.

    Args:
        trainer: of the run.
        budget: with its mode, if that is known.
        by_metric: whether the logged metric told it.

    Raises:
        SpecError: they monitor the metric, and each of them has the opposite mode.
    """
    modes = {keeper.mode for keeper in checkpoint_callbacks(trainer) if keeper.monitor == budget.monitor}
    if budget.mode is not None and modes and budget.mode not in modes:
        told = f", by the torchmetrics object that is logged as {budget.monitor!r}," if by_metric else ""
        raise SpecError(
            f"budget: mode={budget.mode!r}{told} contradicts ModelCheckpoint(monitor={budget.monitor!r}, "
            f"mode={modes.pop()!r}), whose best checkpoint would be the worst by the budget: one of them is wrong (a "
            "ModelCheckpoint without a mode takes 'min')"
        )


def logged_per_dataloader(monitor: str, names: Iterable[str]) -> list[str]:
    """The names under which Lightning logs a metric if there are several dataloaders."""
    return sorted(name for name in names if name.startswith(f"{monitor}/dataloader_idx_"))


def _meant(monitor: str, names: Iterable[str]) -> str:
    """A hint at the metric that was meant, with a leading space; empty if none is near."""
    if indexed := logged_per_dataloader(monitor, names):
        meant = " or ".join(map(repr, indexed[:3]))
        return f" There are several dataloaders, so Lightning appends their index. Did you mean {meant}?"
    return nearest(monitor, list(names))


def checkpoint_callbacks(trainer: Trainer) -> list[ModelCheckpoint]:
    """The ModelCheckpoints of the run; what only has the class, such as a mock in a test, keeps no files."""
    kind = namespace_of(trainer).pytorch.callbacks.ModelCheckpoint
    return [callback for callback in trainer.callbacks if isinstance(callback, kind) and hasattr(callback, "monitor")]  # type: ignore[attr-defined]
