"""Hyper-parameters that a Trainer takes out of a module before a run."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tinyq_lightning.file import HYPER_PARAMETERS

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

__all__ = [
    "hyper_parameters_of",
    "with_removed_hyper_parameters",
]


def hyper_parameters_of(owner: object) -> dict[str, Any]:
    """Those of a module or data module, with what a Trainer has removed because it cannot be pickled, such as lambdas.

    Files must name these: a module that is loaded without one would have the default of its class instead.
    """
    return {**vars(owner).get("_hparams", {}), **_removed(owner)}


def with_removed_hyper_parameters(base: Mapping[str, Any], module: LightningModule) -> Mapping[str, Any]:
    """A float checkpoint of the module that has the hyper-parameters which the Trainer has removed before."""
    removed = _removed(module)
    return {**base, HYPER_PARAMETERS: {**base.get(HYPER_PARAMETERS, {}), **removed}} if removed else base


def _removed(owner: object) -> dict[str, Any]:
    made_with, now = vars(owner).get("_hparams_initial") or {}, vars(owner).get("_hparams") or {}
    return {name: value for name, value in made_with.items() if name not in now and not _can_be_pickled(value)}


def _can_be_pickled(value: object) -> bool:
    try:
        pickle.dumps(value)
    except Exception:  # of a value's own class too
        return False
    return True
