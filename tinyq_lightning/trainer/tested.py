"""What a test run tested: its float values, which another callback may exchange, and what it logs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, takewhile
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from tinyq_lightning.namespaces import namespace_of
from tinyq_lightning.plan import Swap
from tinyq_lightning.trainer.inner_trainer import changes_batches
from tinyq_lightning.trainer.validated import WatchesValidation
from tinyq_lightning.trainer.values import MAX_COUNTS, has_values

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = [
    "FloatValues",
    "SetByCallbacks",
    "as_tested",
    "float_values",
    "log_of_test",
    "may_exchange_weights",
]

FloatValues: TypeAlias = "list[tuple[Tensor, Tensor]]"
"""Tensors, each with a copy of its values."""


def may_exchange_weights(trainer: Trainer) -> bool:
    """Whether a callback of the user's does something in ``on_test_end``, such as putting its own weights back.

    Progress bars do, but not to weights.
    """
    pytorch = namespace_of(trainer).pytorch
    others = [
        each for each in _callbacks(trainer) if not isinstance(each, WatchesValidation | pytorch.callbacks.ProgressBar)
    ]
    return any(_does(each, "on_test_end", pytorch.Callback) for each in others)


def _does(callback: Any, hook: str, base: type) -> bool:
    """Whether a callback has a hook of its own: any callable that it has, such as that of a LambdaCallback."""
    return getattr(getattr(callback, hook), "__func__", None) is not getattr(base, hook)


def _callbacks(trainer: Trainer) -> Sequence[Any]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def float_values(module: nn.Module, swaps: Iterable[Swap]) -> FloatValues:
    """The float tensors of a module with any of the swaps in it.

    Args:
        module: the user's.
        swaps: out of the module.
    """
    found: dict[int, Tensor] = {}
    for swap in swaps:
        with swap:
            found |= {id(each): each for each in chain(module.parameters(), module.buffers())}
    return [(each, each.detach().clone()) for each in found.values() if each.is_floating_point()]


class SetByCallbacks:
    """What callbacks before ours set in a module when a test starts, such as an average's buffers and a flag.

    Buffers, small parameters that are not trained, and plain attributes: what a snapshot puts back. Nothing where a
    callback's own hooks run again for each model, since its values would be set twice.

    Args:
        trainer: whose callbacks' ``on_test_start`` come next.
        module: the user's.
    """

    def __init__(self, trainer: Trainer, module: nn.Module) -> None:
        base = namespace_of(trainer).pytorch.Callback
        earlier = list(takewhile(lambda each: not isinstance(each, WatchesValidation), _callbacks(trainer)))
        sets = any(_does(each, "on_test_start", base) for each in earlier)
        again = any(changes_batches(each, "test") for each in earlier)
        modules = list(module.modules()) if sets and not again else []
        self._tensors = [(*found, found[-1].detach().clone()) for each in modules for found in _put_back(each)]
        self._plain = [(vars(each), _plain(vars(each))) for each in modules]

    def noted(self) -> Callable[[], None]:
        """A function that sets again what was set since; of a tensor that was exchanged, the values in the old one."""
        tensors = [
            (holder, name, tensor, holder[name].detach().clone())
            for holder, name, tensor, value in self._tensors
            if _was_set(holder.get(name), value)
        ]
        plain = [
            (attributes, {name: value for name, value in _plain(attributes).items() if before.get(name, self) != value})
            for attributes, before in self._plain
        ]

        def set_again() -> None:
            with torch.inference_mode(False), torch.no_grad():
                for holder, name, tensor, value in tensors:
                    if holder.get(name) is tensor:
                        tensor.detach().copy_(value)
            for attributes, values in plain:
                attributes.update(values)

        return set_again


def _put_back(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Of a module's own tensors those whose values a snapshot puts back, each with what holds it and its name."""
    holders: list[dict[str, Any]] = [module._buffers, module._parameters]
    for holder in holders:
        for name, tensor in holder.items():
            if tensor is None or tensor.requires_grad or tensor.is_inference() or not _is_plain(tensor):
                continue
            if not isinstance(tensor, nn.Parameter) or tensor.numel() <= MAX_COUNTS:
                yield holder, name, tensor


def _is_plain(tensor: Tensor) -> bool:
    return has_values(tensor) and type(tensor.detach()) is Tensor


def _was_set(now: Tensor | None, value: Tensor) -> bool:
    """Whether a tensor, or the one in its place, has other values than were there, of one shape and type."""
    if now is None or not _is_plain(now):
        return False
    alike = (now.shape, now.dtype, now.device) == (value.shape, value.dtype, value.device)
    return alike and not torch.equal(now, value)


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    kinds = (bool, int, float, str, type(None))
    return {
        name: value
        for name, value in attributes.items()
        if type(value) in kinds and not name.startswith("_") and name != "training"
    }


@contextmanager
def as_tested(swap: Swap, values: FloatValues) -> Iterator[None]:
    """Context manager in which the quantized layers are in, and tensors have the values that were tested.

    Args:
        swap: out of the module.
        values: of :func:`float_values`, when the epoch ended.
    """
    differ = ((tensor, value) for tensor, value in values if not torch.equal(tensor, value))
    changed = [(tensor, tensor.detach().clone(), value) for tensor, value in differ]
    with swap:
        try:
            for tensor, _, value in changed:
                tensor.detach().copy_(value)
            yield
        finally:
            for tensor, now, _ in changed:
                tensor.detach().copy_(now)


def log_of_test(trainer: Trainer, module: LightningModule, entries: Mapping[str, float]) -> None:
    """Log through the module, as its own hook at the end of the epoch would.

    Before 2.5.3 ``LightningModule.log`` refuses every name of one dataloader's metric, so they go past it.
    """
    several = trainer.world_size > 1
    of_loaders = {name: value for name, value in entries.items() if "/dataloader_idx_" in name}
    others = {name: value for name, value in entries.items() if name not in of_loaders}
    module.log_dict(others, sync_dist=several, add_dataloader_idx=False)
    results: Any = trainer._results
    for name, value in of_loaders.items():
        results.log(
            module._current_fx_name,
            name,
            torch.tensor(value, device=module.device),
            logger=True,
            on_epoch=True,
            sync_dist=several,
            sync_dist_fn=trainer.strategy.reduce,
            add_dataloader_idx=False,
        )
