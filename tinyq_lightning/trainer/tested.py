"""What a test run tested: its float values, which another callback may exchange, and what it logs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from tinyq_lightning.namespaces import namespace_of
from tinyq_lightning.plan import Swap
from tinyq_lightning.trainer.validated import WatchesValidation
from tinyq_lightning.trainer.values import MAX_COUNTS

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = [
    "FloatValues",
    "as_tested",
    "float_values",
    "log_of_test",
    "may_exchange_weights",
    "set_by_callbacks",
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
    # a hook may be any callable that an instance has, such as that of a LambdaCallback
    return any(getattr(each.on_test_end, "__func__", None) is not pytorch.Callback.on_test_end for each in others)


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


def set_by_callbacks(module: nn.Module) -> Callable[[], None]:
    """A function that sets again what callbacks may have set in a module, such as an average's buffers and a flag.

    Buffers and plain attributes; the values of parameters are as they are now.

    Args:
        module: the user's, when the test has started.
    """
    tensors = [each for each in chain(module.parameters(), module.buffers()) if _is_put_back(each)]
    kept = [(each, each.detach().clone()) for each in tensors]
    plain = [(vars(each), _plain(vars(each))) for each in module.modules()]

    def set_again() -> None:
        with torch.inference_mode(False), torch.no_grad():
            for tensor, value in kept:
                tensor.detach().copy_(value)
        for attributes, values in plain:
            attributes.update(values)

    return set_again


def _is_put_back(tensor: Tensor) -> bool:
    may_count = not isinstance(tensor, nn.Parameter) or tensor.numel() <= MAX_COUNTS
    return may_count and not (tensor.requires_grad or tensor.is_meta or tensor.is_inference())


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
