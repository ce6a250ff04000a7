"""How the layers of a model are called: with how many rows, how often."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tinyq_lightning.kernels import autocast_dtype
from tinyq_lightning.layers import QuantizedLayer, first_tensor, kind_of
from tinyq_lightning.plan import Swap

__all__ = [
    "MAX_ROWS",
    "Call",
    "counted_calls",
    "representative",
]

MAX_ROWS = 256
"""Calls with more rows are timed with this many: beyond it, time grows with the rows in float and in int8 alike."""


@dataclass(frozen=True)
class Call:
    """A way in which a layer is called, as far as its time depends on it.

    Attributes:
        rows: how much is computed: of a linear layer's input the product of all its dimensions but the last, of
            other inputs the number of their values.
        dtype: of the input.
        autocast: the dtype that autocast computes in; None outside of autocast.
        device: of the input.
        part: start and stop of the slice of the weight's rows that is used, if attention takes its
            projections apart; None for all of them.
        sizes: of the inputs; empty if the rows tell all.
    """

    rows: int
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    device: str = "cpu"
    part: tuple[int | None, int | None] | None = None
    sizes: tuple[int, ...] = ()


@contextmanager
def counted_calls(swap: Swap, calls: dict[str, Counter[Call]]) -> Iterator[None]:
    """Count the calls of the layers of ``swap`` while the model runs inside the block.

    Args:
        swap: in the model; or out of it, if no :attr:`~Swap.fused` kernel runs its float layers.
        calls: counters by the name of the layer; those that are missing are added, empty.
    """
    with ExitStack() as stack:
        for name, layer, places in swap.called_places():
            tally = _Tally(layer, calls.setdefault(name, Counter()))
            for place in places:
                stack.callback(place.register_forward_pre_hook(tally.before_forward, with_kwargs=True).remove)
            if hasattr(layer, "forward_rows"):  # attention calls this method, which runs no hook
                vars(layer)["forward_rows"] = tally.forward_rows
                stack.callback(vars(layer).pop, "forward_rows")
        yield


class _Tally:
    """Counts the calls of one layer."""

    def __init__(self, layer: QuantizedLayer, calls: Counter[Call]) -> None:
        self._calls, self._forward_rows = calls, getattr(layer, "forward_rows", None)
        self._layer, self._kind = layer, kind_of(layer)

    def before_forward(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        assert self._kind is not None
        try:
            rows, sizes = self._kind.size_of_call(self._layer, args, kwargs)
            x = first_tensor(args, kwargs)
        except TypeError:  # for the layer itself to refuse
            return
        if rows or not x.is_nested:
            self._note(x, rows, sizes, None)

    def forward_rows(self, input: Tensor, rows: slice) -> Any:
        self._note(input, input.shape[:-1].numel(), (), (rows.start, rows.stop))
        assert self._forward_rows is not None
        return self._forward_rows(input, rows)

    def _note(self, x: Tensor, rows: int, sizes: tuple[int, ...], part: tuple[int | None, int | None] | None) -> None:
        autocast = autocast_dtype(x.device.type)
        self._calls[Call(rows, x.dtype, autocast, str(x.device), part, sizes)] += 1


def representative(calls: Mapping[Call, int]) -> dict[Call, float]:
    """Calls to time that stand for all of ``calls``, each with its weight.

    Calls are grouped by their rows, those within the same power of two together and those above
    :data:`MAX_ROWS`, where rows tell all, taken as that many; the most frequent call of a group stands for it.
    So a handful of calls stand for an evaluation with any number of lengths.

    Returns:
        The weight by call: the rows of its group over its own rows.
    """
    classes: dict[Call, Counter[Call]] = defaultdict(Counter)
    for call, count in calls.items():
        if call.rows:
            classes[replace(call, rows=_timed_rows(call).bit_length(), sizes=())][call] += count
    found = {}
    for alike in classes.values():
        most = max(alike, key=lambda call: (alike[call], call.rows))
        timed = replace(most, rows=_timed_rows(most))
        found[timed] = sum(call.rows * count for call, count in alike.items()) / timed.rows
    return found


def _timed_rows(call: Call) -> int:
    return call.rows if call.sizes else min(call.rows, MAX_ROWS)
