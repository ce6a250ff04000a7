"""Builds modules without memory for their parameters, and gives them the tensors of a file as values."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils import swap_tensors

from tinyq_lightning.layers import Int8Weight, QuantizedLayer

__all__ = [
    "drop_weak_references",
    "named_tensors",
    "put_value",
    "restore_weak_references",
    "take_values",
    "watched_meta_tensors",
    "without_weights",
]


@contextmanager
def without_weights() -> Iterator[None]:
    """Context manager: each parameter that is registered in a module moves to the meta device.

    A parameter has memory until it is registered, so at most one at a time does. It stays the same object, so
    ties stay. Buffers are not moved, because ``__init__`` may compute values that no file holds.
    """
    here = threading.get_ident()

    def move(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if threading.get_ident() == here and type(parameter) is nn.Parameter and not parameter.is_meta:
            put_value(parameter, torch.empty_like(parameter, device="meta"))

    handle = register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def watched_meta_tensors() -> Iterator[Callable[[], bool]]:
    """Context manager that knows which meta tensors were made in the block, wherever they are held.

    The collector of garbage rests in the block. What is made there so stays among its youngest objects, which are few:
    to look through all objects of a process that has imported much takes a fifth of a second.

    Yields:
        A function, to be called in the block, that returns True if any meta tensor made in the block still exists. If
        something had garbage collected meanwhile, older ones may count too, and those of other threads always do.
    """
    with _COLLECTOR.resting():
        before, collections = _meta_tensors(generation=0), _collections()
        known = {id(tensor) for tensor in before}  # `before` keeps them alive, so no new tensor gets such an id

        def leaves_any() -> bool:
            young = _collections() == collections
            left = {id(tensor) for tensor in _meta_tensors(0 if young else None)} - known
            if left:
                gc.collect(0 if young else 2)
                left &= {id(tensor) for tensor in _meta_tensors(1 if young else None)}  # what was not garbage is older
            return bool(left)

        yield leaves_any


class _Collector:
    """The collector of garbage, which rests while any thread has it rest."""

    def __init__(self) -> None:
        self._lock, self._users, self._resumes = threading.Lock(), 0, False

    @contextmanager
    def resting(self) -> Iterator[None]:
        with self._lock:
            if self._users == 0:
                self._resumes = gc.isenabled()
                gc.disable()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0 and self._resumes:
                    gc.enable()


_COLLECTOR = _Collector()


def _meta_tensors(generation: int | None) -> list[Tensor]:
    return [thing for thing in gc.get_objects(generation) if issubclass(type(thing), Tensor) and thing.is_meta]


def _collections() -> int:
    """How often garbage was collected in this process."""
    return sum(generation["collections"] for generation in gc.get_stats())


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers with their names; a tensor that has several names comes once for each."""
    return chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))


def put_value(tensor: Tensor, value: Tensor) -> None:
    """Give ``tensor`` the memory, dtype and device of ``value``. ``tensor`` stays the same object."""
    value = value.detach()  # a new object, because swap_tensors exchanges the two
    swap_tensors(tensor, nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value)  # type: ignore[no-untyped-call]


def drop_weak_references(module: nn.Module) -> None:
    """Have the layers below ``module`` refer weakly to their tensors no more, so that values can be put there.

    Recurrent and quantized ones do, and torch swaps no tensor that is referred to so.
    """
    for layer in module.modules():
        if isinstance(layer, nn.RNNBase):
            layer._flat_weight_refs = []
        elif isinstance(layer, Int8Weight):
            layer.forget_own_codes()


def restore_weak_references(module: nn.Module) -> None:
    """Have the layers below ``module`` refer to the tensors that they hold now."""
    for layer in module.modules():
        if isinstance(layer, nn.RNNBase):
            layer._init_flat_weights()
        elif isinstance(layer, Int8Weight):
            layer.recall_own_codes()


def take_values(module: nn.Module, state_dict: Mapping[str, Tensor]) -> bool:
    """Give each meta tensor of the module the value of its entry in ``state_dict``, in the module's dtype.

    Codes of four bits get memory of their own, into which ``load_state_dict`` expands what is packed in the entry.

    Returns:
        False if a meta tensor has no entry of its name and shape; the module is then only partly filled.
    """
    drop_weak_references(module)
    try:
        return _take_values(module, state_dict)
    finally:
        restore_weak_references(module)


def _codes_of_four_bits(module: nn.Module) -> set[int]:
    """The ids of the buffers with expanded codes."""
    layers = [layer for layer in module.modules() if isinstance(layer, QuantizedLayer) and layer.bits == 4]
    return {id(holder._buffers[name]) for layer in layers for holder, name in layer.code_places().values()}


def _take_values(module: nn.Module, state_dict: Mapping[str, Tensor]) -> bool:
    packed, taken = _codes_of_four_bits(module), set()
    saved: dict[int, str] = {}
    for name, tensor in named_tensors(module):
        if tensor.is_meta and not saved and name not in state_dict and id(tensor) not in packed:
            # it may have another name there
            saved = {id(value): key for key, value in module.state_dict(keep_vars=True).items()}
        value = state_dict.get(name, state_dict.get(saved.get(id(tensor), name)))
        if tensor.is_meta and value is None and not tensor.numel():
            put_value(tensor, torch.empty_like(tensor, device="cpu"))  # a quantized layer's, which no file holds
        elif tensor.is_meta and id(tensor) in packed:
            put_value(tensor, torch.zeros_like(tensor, device="cpu"))
        elif tensor.is_meta:
            if not isinstance(value, Tensor) or value.shape != tensor.shape:
                return False
            shared = value.untyped_storage()._cdata in taken
            taken.add(value.untyped_storage()._cdata)
            put_value(tensor, value.to(tensor.dtype, copy=shared))
    return True
