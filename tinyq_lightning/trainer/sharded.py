"""Quantizes a model that no process holds whole: on rank 0, one layer at a time.

The weights come from the checkpoint, a file or a folder, or from the shards of all processes. Rank 0 holds its shard,
one float layer and the codes that it writes; the others hold their shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from tinyq_lightning.errors import EvaluationError
from tinyq_lightning.file import (
    ByLayer,
    apart_from_weights,
    drop_weak_references,
    make_checkpoint,
    open_checkpoint,
)
from tinyq_lightning.namespaces import namespace_of
from tinyq_lightning.plan import Plan, quantize_by_layer, state_bytes
from tinyq_lightning.spec import QuantizationSpec
from tinyq_lightning.trainer.comparable import recorded_score
from tinyq_lightning.trainer.float_weights import FloatWeights
from tinyq_lightning.trainer.gather import Gather
from tinyq_lightning.trainer.hyper_parameters import with_removed_hyper_parameters
from tinyq_lightning.trainer.ranks import write_on_rank_zero
from tinyq_lightning.trainer.results import numbers
from tinyq_lightning.trainer.twin import unsharded_twin, whole_class

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = [
    "QuantizedShards",
    "quantize_sharded",
    "refuse_measuring_sharded",
]


@dataclass(frozen=True)
class QuantizedShards:
    """One method on a sharded model; the same on each rank except for the content.

    Attributes:
        plan: what was quantized.
        float_bytes: of the whole float state dict's tensors.
        bytes: of the whole quantized state dict's tensors.
        content: of the checkpoint, on rank 0; elsewhere only what it could not hold.
    """

    plan: Plan
    float_bytes: int
    bytes: int
    content: dict[str, Any]

    def take_content(self) -> dict[str, Any]:
        """The content, for the file."""
        return self.content

    def without_tensors(self) -> QuantizedShards:
        """What the other ranks are told."""
        return replace(self, content={"tinyq": {"dropped": self.content["tinyq"]["dropped"]}})


def refuse_measuring_sharded(trainer: Trainer, spec: QuantizationSpec) -> None:
    """Refuse before training what would need the quantized model to run.

    Raises:
        EvaluationError: the spec has a budget, ``never_slower``, ``calibrate`` or exports.
    """
    needs = {
        "a budget": spec.budget,
        "never_slower": spec.never_slower,
        "calibrate": spec.calibrate,
        "export": spec.export,
    }
    wanted = next((name for name, asked in needs.items() if asked), None)
    if wanted:
        raise EvaluationError(
            f"{wanted} needs the model to run as it is quantized, and under {type(trainer.strategy).__name__} no "
            "process holds it whole. Leave it out here; to have it, give what was trained to a fit of no epochs on one "
            "device: Trainer(devices=1, max_epochs=0, callbacks=[TinyQCallback(..., weights='current')])"
            ".fit(Net.load_from_checkpoint(FILE), datamodule), where configure_model must leave the model whole if "
            "self.device_mesh is None. A checkpoint that is a folder becomes FILE by python -m "
            f"{namespace_of(trainer).fabric_name}.utilities.consolidate_checkpoint FOLDER"
        )


def quantize_sharded(
    trainer: Trainer, module: LightningModule, spec: QuantizationSpec, source: FloatWeights
) -> Iterator[QuantizedShards]:
    """Each method of the spec, on every rank; then warn that there are no metrics.

    Args:
        trainer: the user's, at the end of a fit.
        module: the user's, sharded. It is as before afterwards.
        spec: one method or several.
        source: the weights.

    Raises:
        TinyQError: the module or a weight cannot be quantized, or the checkpoint cannot be read.
    """
    for each in spec.each():
        yield _quantize_on_ranks(trainer, module, each, source)
    rank_zero_warn(f"TinyQ: quantized without a comparison: {_why_not_measured(trainer, module, source)}")


def _why_not_measured(trainer: Trainer, module: LightningModule, source: FloatWeights) -> str:
    """Which numbers there are not, and how to get them."""
    kind = whole_class(module)
    command = (
        f"tinyq-lightning evaluate --model {kind.__module__}:{kind.__qualname__} --data package.module:Data "
        f"{source.path or 'FLOAT'} QUANTIZED"
    )
    of_float = "" if source.path else ", where FLOAT is what trainer.save_checkpoint(...) writes"
    return (
        f"under {type(trainer.strategy).__name__} no process holds the whole model, so the metrics of the quantized "
        f"one were not measured.{_known_of_float(trainer, source)} For those of both, on one device: "
        f"{command}{of_float}"
    )


def _known_of_float(trainer: Trainer, source: FloatWeights) -> str:
    """What validation gave for the float weights, in a sentence; empty where nothing is known."""
    if source.path is None:
        results = trainer.fit_loop.epoch_loop.val_loop._results
        logged = {name for each in results.values() for name in results._forked_name(each, on_step=False)}
        last = {name: value for name, value in numbers(trainer.callback_metrics).items() if name in logged}
        told = ", ".join(f"{name} {value:.6g}" for name, value in last.items())
        return f" The last validation of the fit gave {told} for the float model." if told else ""
    if (recorded := recorded_score(trainer, source.path)) is None:
        return ""
    monitor, score = recorded
    return f" ModelCheckpoint recorded {monitor} {score:.6g} for the float model."


def _quantize_on_ranks(
    trainer: Trainer, module: LightningModule, spec: QuantizationSpec, source: FloatWeights
) -> QuantizedShards:
    """What rank 0 makes, on every rank; the others give it their shards, if it needs them.

    Whichever rank fails, all make the same calls to one another in the same order: some backends would wait for ever.
    """
    gather = None if source.path else Gather(module)

    def make() -> QuantizedShards:
        try:
            return _quantize(module, spec, source, gather)
        finally:
            if gather is not None:
                gather.end()

    if gather is not None and not trainer.is_global_zero:
        gather.answer()
    made = write_on_rank_zero(trainer, make)
    told = trainer.strategy.broadcast(made.without_tensors() if made is not None else None)
    return made if made is not None else cast("QuantizedShards", told)


def _quantize(
    module: LightningModule, spec: QuantizationSpec, source: FloatWeights, gather: Gather | None
) -> QuantizedShards:
    twin = unsharded_twin(module)
    drop_weak_references(twin)
    float_bytes = state_bytes(twin.state_dict())
    with _weights(gather, source) as (read, base):
        by_layer = ByLayer(twin, read)
        plan = quantize_by_layer(twin, spec, by_layer.present)
        by_layer.fill()
    base = with_removed_hyper_parameters(base, module)
    content = make_checkpoint(base, twin.state_dict(), plan, {}, source.sha256, None)
    return QuantizedShards(plan, float_bytes, state_bytes(content["state_dict"]), content)


@contextmanager
def _weights(
    gather: Gather | None, source: FloatWeights
) -> Iterator[tuple[Callable[[str], Tensor], Mapping[str, Any]]]:
    """What reads an entry of the state dict, and the rest of the checkpoint."""
    if gather is not None:
        yield gather.whole, source.base
        return
    with open_checkpoint(source.path, source.trusted) as opened:
        state = opened.content["state_dict"]
        yield (lambda name: opened.read(state[name])), opened.read_all(apart_from_weights(opened.content))
