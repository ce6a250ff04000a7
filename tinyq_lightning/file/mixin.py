"""A mixin by which Lightning's own ways of loading take quantized checkpoints."""

from __future__ import annotations

import os
from typing import IO, Any

from tinyq_lightning.errors import CheckpointError, ModelError
from tinyq_lightning.file.archive import Archive
from tinyq_lightning.file.checkpoint import read_checkpoint
from tinyq_lightning.file.hooks import HookView, call_hook
from tinyq_lightning.file.loading import load_content
from tinyq_lightning.file.structure import restore_structure
from tinyq_lightning.file.validate import is_quantized
from tinyq_lightning.namespaces import is_lightnings

__all__ = [
    "QuantizedCheckpointMixin",
]


class QuantizedCheckpointMixin:
    """Makes ``load_from_checkpoint`` and ``ckpt_path`` take quantized checkpoints as well as float ones.

    Put it first: ``class Net(QuantizedCheckpointMixin, LightningModule)``. An ``on_load_checkpoint`` of
    the class still runs, after the quantized layers have been put in.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(QuantizedCheckpointMixin)]
        if any(is_lightnings(kind, "LightningModule") for kind in before):
            raise ModelError(
                f"write QuantizedCheckpointMixin first: class {cls.__name__}(QuantizedCheckpointMixin, ...)"
            )
        own = cls.__dict__.get("on_load_checkpoint")
        if own is not None:

            def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
                _prepare_if_quantized(self, checkpoint)
                call_hook(lambda view: own(self, view), type(self), checkpoint, "the checkpoint")

            cls.on_load_checkpoint = on_load_checkpoint  # type: ignore[method-assign]

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | os.PathLike[str] | IO[bytes],
        map_location: Any = None,
        hparams_file: str | os.PathLike[str] | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        trust: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As of Lightning; a quantized file is loaded as by :func:`~tinyq_lightning.load_quantized`, in train mode.

        Raises:
            CheckpointError: see :func:`~tinyq_lightning.load_quantized`; or ``hparams_file`` is given with a
                quantized file, which holds its hyper-parameters itself.
        """
        if _holds_quantized(checkpoint_path):
            is_path = isinstance(checkpoint_path, str | os.PathLike)
            source = str(checkpoint_path if is_path else getattr(checkpoint_path, "name", "the file"))
            if hparams_file is not None:
                raise CheckpointError(
                    f"{source}: it is quantized and holds its hyper-parameters, so hparams_file={str(hparams_file)!r} "
                    f"is not read: leave it out, and give what shall differ as arguments, as in {cls.__name__}."
                    "load_from_checkpoint(path, name=...)"
                )
            content = read_checkpoint(checkpoint_path)
            return load_content(content, cls, kwargs, source, map_location, strict, trust)  # type: ignore[type-var]
        if weights_only is not None:  # Lightning before 2.6 takes no such argument
            kwargs["weights_only"] = weights_only
        return super().load_from_checkpoint(  # type: ignore[misc]
            checkpoint_path, map_location, hparams_file, strict, **kwargs
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook, called before the state dict is loaded."""
        _prepare_if_quantized(self, checkpoint)
        call_hook(super().on_load_checkpoint, type(self), checkpoint, "the checkpoint")  # type: ignore[misc]


def _holds_quantized(path: str | os.PathLike[str] | IO[bytes]) -> bool:
    try:
        with Archive(path) as archive:
            return is_quantized(archive.content)
    except CheckpointError:  # Lightning reads it, or says why not
        return False


def _prepare_if_quantized(module: Any, checkpoint: dict[str, Any]) -> None:
    # a HookView comes from load_content or from the hook of a subclass, which has put the layers in
    if is_quantized(checkpoint) and not isinstance(checkpoint, HookView):
        restore_structure(module, getattr(module, "_trainer", None), checkpoint, "the checkpoint")
