"""Exports of a run, written on rank 0 beside the quantized checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils import _pytree as pytree

from tinyq_lightning.handover import ExportReport, export_beside
from tinyq_lightning.plan import Plan
from tinyq_lightning.spec import QuantizationSpec
from tinyq_lightning.trainer.failures import Failing, step_after_run
from tinyq_lightning.trainer.ranks import write_on_rank_zero

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = [
    "copy_of_batch",
    "export_beside_file",
]


def copy_of_batch(batch: Any) -> Any:
    """A batch whose tensors are copies on the CPU, since a step may change those it is given."""
    with torch.no_grad():
        return pytree.tree_map(lambda leaf: leaf.detach().cpu().clone() if isinstance(leaf, Tensor) else leaf, batch)


class _Exporting(Failing, Protocol):
    """What asks for exports, and the first batch that it has seen."""

    spec: QuantizationSpec
    first_batch: Any


def export_beside_file(
    owner: _Exporting, trainer: Trainer, module: LightningModule, plan: Plan, quantized_path: str
) -> tuple[ExportReport, ...]:
    """Write the exports that the owner's spec asks for; each may fail alone, with a warning.

    Args:
        owner: its ``error`` is set if one fails.
        trainer: the user's.
        module: with the quantized layers in it.
        plan: what was quantized; nothing is exported where every layer stays float.
        quantized_path: of the checkpoint, which is written already.

    Returns:
        The reports on rank 0; nothing on other ranks.
    """
    if owner.spec.export and plan.is_float:
        rank_zero_info("TinyQ: nothing was exported, since all layers stay float")
        return ()
    reports: list[ExportReport] = []
    for name in owner.spec.export:

        def write(name: str = name) -> None:
            reports.append(export_beside(module, quantized_path, name, owner.first_batch))

        with step_after_run(owner, trainer, f"Exporting to {name}"):
            write_on_rank_zero(trainer, write)
    return tuple(reports)
