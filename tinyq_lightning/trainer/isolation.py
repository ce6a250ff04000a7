"""Leaves a module, and the random state around it, exactly as they were."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "Attributes",
    "RandomState",
    "preserved",
    "rewound_randomness",
]


class Attributes:
    """The attributes of every module below a root, to be put back as they were.

    Each module's ``__dict__`` is kept: training flags, hooks, submodules, parameters as objects, and
    whatever users put there. Lists, dicts, sets and deques are put back with their former contents,
    also inside one another. Tensors are put back as objects; see :func:`preserved` for their values.

    Args:
        root: the module.
    """

    def __init__(self, root: nn.Module) -> None:
        self._modules = [(module, dict(vars(module)), _rewinders(vars(module))) for module in root.modules()]

    def put_back(self) -> None:
        """Every attribute as it was."""
        for module, attributes, rewinders in self._modules:
            vars(module).clear()
            vars(module).update(attributes)
            for rewind in rewinders:
                rewind()


def _rewinders(attributes: dict[str, Any]) -> list[Callable[[], None]]:
    """A call for each plain container below ``attributes`` that gives it back its contents."""
    calls: list[Callable[[], None]] = []
    seen: set[int] = set()
    pending = list(attributes.values())
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if type(value) in (dict, OrderedDict):
            calls.append(_rewind_dict(value, dict(value)))
            pending.extend(value.values())
        elif type(value) in (list, deque):
            calls.append(_rewind_list(value, list(value)))
            pending.extend(value)
        elif type(value) is set:
            calls.append(_rewind_dict(value, set(value)))
        elif type(value) is tuple:
            pending.extend(value)
    return calls


def _rewind_dict(value: Any, contents: Any) -> Callable[[], None]:
    def rewind() -> None:
        value.clear()
        value.update(contents)

    return rewind


def _rewind_list(value: Any, contents: list[Any]) -> Callable[[], None]:
    def rewind() -> None:
        value.clear()
        value.extend(contents)

    return rewind


@contextmanager
def preserved(module: nn.Module, weights: bool) -> Iterator[None]:
    """Put back, after the block, all attributes of ``module`` and its submodules, and its tensors' values.

    Args:
        module: what to preserve.
        weights: keep the values of parameters too, at the cost of a copy of them. Buffers and tensors
            held as plain attributes, such as the states of metrics, always keep theirs.
    """
    tensors: dict[int, Tensor] = {}
    for each in module.modules():
        held = [
            *each._buffers.values(),
            *vars(each).values(),
            *(each._parameters.values() if weights else ()),
        ]
        tensors.update({id(value): value for value in held if isinstance(value, Tensor)})
    attributes = Attributes(module)
    copies = [(tensor, tensor.detach().clone()) for tensor in tensors.values() if not tensor.is_meta]
    try:
        yield
    finally:
        attributes.put_back()
        with torch.no_grad():
            for tensor, copy in copies:
                tensor.data.copy_(copy)


class RandomState:
    """The state of every random generator, to be put back: Python's, NumPy's, torch's, the loaders' own.

    Args:
        loaders: dataloaders whose generators, and whose samplers' generators, belong to it.
    """

    def __init__(self, loaders: Iterable[Any] = ()) -> None:
        holders = [holder for loader in loaders for holder in (loader, getattr(loader, "sampler", None))]
        generators = {id(g): g for h in holders if isinstance(g := getattr(h, "generator", None), torch.Generator)}
        self._own = [(generator, generator.get_state()) for generator in generators.values()]
        self._python, self._numpy, self._torch = (
            random.getstate(),
            np.random.get_state(),
            torch.get_rng_state(),
        )
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def put_back(self) -> None:
        """Every generator as it was."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        for generator, state in self._own:
            generator.set_state(state)


@contextmanager
def rewound_randomness(loaders: Iterable[Any] = ()) -> Iterator[None]:
    """Put the :class:`RandomState` back after the block."""
    state = RandomState(loaders)
    try:
        yield
    finally:
        state.put_back()
