"""Brings a callback's results back to the process that called ``fit``, if the strategy launched others for it."""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from tinyq_lightning.namespaces import namespace_of

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer

__all__ = [
    "registered",
    "return_to_main_process",
]

# The callbacks of this process by a key that is the same in a copy that a launched process holds.
_CALLBACKS: WeakValueDictionary[str, Callback] = WeakValueDictionary()


def registered(callback: Callback, key: str | None = None) -> str:
    """Register a callback under ``key`` and return the key; a new one if another callback of this process has it.

    A callback that is unpickled in a launched process keeps its key. A deep copy gets a new one.
    """
    if key is None or _CALLBACKS.get(key, callback) is not callback:
        key = uuid.uuid4().hex
    _CALLBACKS[key] = callback
    return key


def return_to_main_process(trainer: Trainer, key: str, attributes: Callable[[], dict[str, Any]]) -> None:
    """In a process that ``ddp_spawn``, ``ddp_fork`` or ``ddp_notebook`` launched: send attributes back after the run.

    The launcher sends ``callback_metrics`` and nothing else of a callback. Our entry is added to it and, when the
    main process unpickles it, sets the attributes of the callback with that key.

    Args:
        trainer: in ``setup``.
        key: from :func:`registered`.
        attributes: called on rank 0 after the run; returns plain data by the name of the attribute.
    """
    launcher = trainer.strategy.launcher
    if isinstance(launcher, namespace_of(trainer).module("strategies.launchers")._MultiProcessingLauncher):
        extra_results = launcher.get_extra_results

        def with_attributes(trainer: Trainer) -> dict[str, Any]:
            return {**extra_results(trainer), f"tinyq/{key}": _Attributes(key, pickle.dumps(attributes()))}

        vars(launcher)["get_extra_results"] = with_attributes


class _Attributes:
    """Attributes of a callback, which are set when this is unpickled in the process that has the callback."""

    def __init__(self, key: str, pickled: bytes) -> None:
        self._key, self._pickled = key, pickled

    def __reduce__(self) -> tuple[Callable[[str, bytes], None], tuple[str, bytes]]:
        return _set_attributes, (self._key, self._pickled)


def _set_attributes(key: str, pickled: bytes) -> None:
    if (callback := _CALLBACKS.get(key)) is not None:
        vars(callback).update(pickle.loads(pickled))
