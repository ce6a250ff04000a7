"""What the user's ``on_load_checkpoint`` sees of a checkpoint that lacks the entries of the training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, SupportsIndex

from tinyq_lightning.errors import CheckpointError, TinyQError
from tinyq_lightning.file.arguments import Arguments
from tinyq_lightning.file.factory import name_of
from tinyq_lightning.file.float_entries import FloatEntries
from tinyq_lightning.file.plain import copied
from tinyq_lightning.file.trust import call_with
from tinyq_lightning.file.validate import HYPER_PARAMETERS, TRAINING_KEYS, is_quantized

__all__ = [
    "HookView",
    "call_hook",
    "dropped_entries",
]

_COUNTS = frozenset(("ready", "started", "processed", "completed"))


class _Nothing(dict[Any, Any]):
    """An empty mapping. What is read below it is empty as well, and the counts of a loop's progress are 0."""

    def __missing__(self, key: Any) -> Any:
        return 0 if key in _COUNTS else _Nothing()

    def __delitem__(self, key: Any) -> None:
        super().pop(key, None)

    def pop(self, key: Any, *default: Any) -> Any:
        return super().pop(key, *(default or (self.__missing__(key),)))


class _NoItems(list[Any]):
    """An empty list, of optimizers or schedulers. What is read by an index is empty, what is put there is lost."""

    def __getitem__(self, index: Any) -> Any:
        try:
            return super().__getitem__(index)
        except IndexError:
            return _Nothing()

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, slice) or -len(self) <= index < len(self):
            super().__setitem__(index, value)

    def __delitem__(self, index: Any) -> None:
        if isinstance(index, slice) or -len(self) <= index < len(self):
            super().__delitem__(index)

    def pop(self, index: SupportsIndex = -1) -> Any:
        return super().pop(index) if self else _Nothing()


_EMPTY_TRAINING: dict[str, Callable[[], Any]] = {
    "callbacks": _Nothing,
    "optimizer_states": _NoItems,
    "lr_schedulers": _NoItems,
    "loops": _Nothing,
}
"""Entries that every checkpoint of a training has."""


class _Asked(dict[Any, Any]):
    """A dict that tells a hook of what the file could not hold.

    Args:
        content: what the file holds.
        absent: names of what it could not hold.
        module_class: the class whose hook it is, for errors.
        source: the file's name, for errors.
    """

    def __init__(
        self, content: Mapping[Any, Any] = {}, absent: Iterable[str] = (), module_class: Any = None, source: str = ""
    ) -> None:
        super().__init__(content)
        self._absent, self._class, self._source = frozenset(absent), module_class, source
        self._told: set[Any] = set()

    def __missing__(self, key: Any) -> Any:
        self._refuse(key)
        raise KeyError(key)

    def get(self, key: Any, default: Any = None) -> Any:
        """As of a dict; raises CheckpointError for what the file could not hold."""
        self._refuse(key)
        return super().get(key, default)

    def pop(self, key: Any, *default: Any) -> Any:
        """As of a dict; raises CheckpointError for what the file could not hold."""
        self._refuse(key)
        return super().pop(key, *default)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """As of a dict; raises CheckpointError for what the file could not hold."""
        self._refuse(key)
        return super().setdefault(key, default)

    def __contains__(self, key: object) -> bool:
        """As of a dict; warns of what the file could not hold, because the hook goes on without it."""
        if self._lacks(key) and key not in self._told:
            self._told.add(key)
            warnings.warn(f"TinyQ: {self._not_held(key, 'asks for')}", stacklevel=2)
        return super().__contains__(key)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # a file or a copy is to hold a plain dict

    def _lacks(self, key: object) -> bool:
        return key in self._absent and key not in self.keys()

    def _refuse(self, key: Any) -> None:
        if self._lacks(key):
            raise CheckpointError(self._not_held(key, "reads"))

    def _not_held(self, key: Any, does: str) -> str:
        return (
            f"{self._source}: on_load_checkpoint of {name_of(self._class)} {does} {key!r}, which the file could not "
            f"hold: give it as it was, as in {call_with(self._class, key)}"
        )


class HookView(_Asked):
    """A copy of a checkpoint for a hook: with empty entries of the training, and errors for what was dropped.

    Its containers are copies, so that the hook changes nothing in the checkpoint. Float weights are in its state dict
    when a hook asks for them by their names, and hyper-parameters have their types.

    Args:
        checkpoint: float or quantized.
        module_class: the class whose hook it is, for errors.
        source: the file's name, for errors.
        given: entries that the file could not hold, by the user.
        arguments: of the module, by the user. They are among the hyper-parameters, as with Lightning.
        trust: as of :func:`~tinyq_lightning.load_quantized`.
    """

    def __init__(
        self,
        checkpoint: Mapping[str, Any],
        module_class: Any,
        source: str,
        given: Mapping[str, Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
        trust: bool = False,
    ) -> None:
        super().__init__(copied(dict(checkpoint)), dropped_entries(checkpoint), module_class, source)
        if is_quantized(checkpoint):
            if isinstance(checkpoint.get("state_dict"), Mapping):
                self["state_dict"] = FloatEntries(checkpoint["state_dict"], checkpoint["tinyq"]["plan"])
            if HYPER_PARAMETERS in checkpoint:
                stored = self[HYPER_PARAMETERS]
                restored = _hyper_parameters(stored, checkpoint, module_class, source, arguments or {}, trust)
                if (absent := _dropped(checkpoint, HYPER_PARAMETERS)) and type(restored) is dict:
                    restored = _Asked(restored, absent, module_class, source)
                self[HYPER_PARAMETERS] = restored
        for key, empty in _EMPTY_TRAINING.items():
            super().setdefault(key, empty())
        self.update({key: value for key, value in (given or {}).items() if key in self._absent})

    def __missing__(self, key: Any) -> Any:
        self._refuse(key)
        if key in TRAINING_KEYS:
            return _Nothing()
        raise KeyError(key)


def _hyper_parameters(
    stored: Any,
    checkpoint: Mapping[str, Any],
    module_class: Any,
    source: str,
    arguments: Mapping[str, Any],
    trust: bool,
) -> Any:
    """Those of a quantized file as they were when the module was made, where that can be told, with the given ones."""
    try:
        found = Arguments(module_class, checkpoint, arguments, trust, source)
        stored = stored if found.from_cli else found.stored
    except (TinyQError, TypeError):  # the module was made in another way
        pass
    if isinstance(stored, dict):
        stored.update({name: value for name, value in arguments.items() if "." not in name})
    return stored


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
    apart = (f"{HYPER_PARAMETERS}.", "datamodule_hyper_parameters.")
    return [name for name in _dropped(checkpoint) if not name.startswith(apart)]


def _dropped(checkpoint: Mapping[str, Any], entry: str | None = None) -> list[str]:
    """What the file could not hold, or of one of its entries only, by the names that it has there."""
    tinyq = checkpoint.get("tinyq")
    dropped = list(tinyq.get("dropped", ())) if isinstance(tinyq, Mapping) else []
    if entry is None:
        return dropped
    return [name.removeprefix(f"{entry}.") for name in dropped if name.startswith(f"{entry}.")]
