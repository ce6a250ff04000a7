"""What the user's ``on_load_checkpoint`` sees of a checkpoint that lacks the entries of the training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tinyq_lightning.errors import CheckpointError
from tinyq_lightning.file.factory import name_of
from tinyq_lightning.file.float_entries import FloatEntries
from tinyq_lightning.file.trust import call_with
from tinyq_lightning.file.validate import HYPER_PARAMETERS

__all__ = [
    "HookView",
    "call_hook",
    "dropped_entries",
]

_EMPTY_TRAINING: dict[str, Callable[[], Any]] = {
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
}
"""Entries that every checkpoint of a training has."""


class HookView(dict[str, Any]):
    """A copy of a checkpoint for a hook: with empty entries of the training, and errors for what was dropped.

    Float weights are in its state dict when a hook asks for them by their names.

    Args:
        checkpoint: float or quantized.
        module_class: the class whose hook it is, for errors.
        source: the file's name, for errors.
        given: entries that the file could not hold, by the user.
    """

    def __init__(
        self, checkpoint: Mapping[str, Any], module_class: Any, source: str, given: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(checkpoint)
        if "tinyq" in checkpoint and isinstance(checkpoint.get("state_dict"), Mapping):
            super().__setitem__("state_dict", FloatEntries(checkpoint["state_dict"], checkpoint["tinyq"]["plan"]))
        self._class, self._source = module_class, source
        for key, empty in _EMPTY_TRAINING.items():
            self.setdefault(key, empty())
        dropped = dropped_entries(checkpoint)
        self.update({key: value for key, value in (given or {}).items() if key in dropped})
        self._absent = set(dropped) - set(self)

    def __missing__(self, key: str) -> Any:
        self._refuse(key)
        raise KeyError(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict; raises CheckpointError for an entry that the file could not hold."""
        self._refuse(key)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        """As of a dict; raises CheckpointError for an entry that the file could not hold."""
        self._refuse(key)
        return super().pop(key, *default)

    def __setitem__(self, key: str, value: Any) -> None:
        self._absent.discard(key)
        super().__setitem__(key, value)

    def _refuse(self, key: str) -> None:
        if key in self._absent:
            raise CheckpointError(
                f"{self._source}: on_load_checkpoint of {name_of(self._class)} reads {key!r}, which the file could not "
                f"hold: give it as it was, as in {call_with(self._class, key)}"
            )


def call_hook(hook: Callable[[Any], Any], module_class: type, checkpoint: dict[str, Any], source: str) -> None:
    """Call an ``on_load_checkpoint`` with a :class:`HookView`; what it changes is changed in ``checkpoint``.

    Raises:
        CheckpointError: the hook reads an entry that the file could not hold.
    """
    if isinstance(checkpoint, HookView):
        hook(checkpoint)
        return
    view = HookView(checkpoint, module_class, source)
    hook(view)
    for key in checkpoint.keys() - view.keys():
        del checkpoint[key]
    checkpoint.update({key: value for key, value in view.items() if key in checkpoint or key not in _EMPTY_TRAINING})


def dropped_entries(checkpoint: Mapping[str, Any]) -> list[str]:
    """The entries of ``on_save_checkpoint`` that the file could not hold."""
    tinyq = checkpoint.get("tinyq")
    dropped = tinyq.get("dropped", ()) if isinstance(tinyq, Mapping) else ()
    apart = (f"{HYPER_PARAMETERS}.", "datamodule_hyper_parameters.")
    return [name for name in dropped if not name.startswith(apart)]
