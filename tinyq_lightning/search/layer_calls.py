"""How the layers of a model are called: with how many rows, how often."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tinyq_lightning.layers import QuantizedLinear
from tinyq_lightning.plan import Swap

__all__ = [
    "MAX_ROWS",
    "Call",
    "counted_calls",
    "input_of",
    "representative",
    "values_of",
]

MAX_ROWS = 256
"""Calls with more rows are timed with this many: beyond it, time grows with the rows in float and in int8 alike."""


@dataclass(frozen=True)
class Call:
    """A way in which a layer is called, as far as its time depends on it.

    Attributes:
        rows: of the input: the product of all its dimensions but the last.
        dtype: of the input.
        autocast: the dtype that autocast computes in; None outside of autocast.
        device: of the input.
        part: start and stop of the slice of the weight's rows that is used, if attention takes its
            projections apart; None for all of them.
    """

    rows: int
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    device: str = "cpu"
    part: tuple[int | None, int | None] | None = None


@contextmanager
def counted_calls(swap: Swap, calls: dict[str, Counter[Call]]) -> Iterator[None]:
    """Count the calls of the layers of ``swap`` while the model runs inside the block.

    Args:
        swap: in the model; or out of it, if no :attr:`~Swap.fused` kernel runs its float layers.
        calls: counters by the name of the layer; those that are missing are added, empty.
    """
    with ExitStack() as stack:
        for name, _, layer in swap.pairs():
            tally = _Tally(layer, calls.setdefault(name, Counter()))
            # hooks are those of the float layer too
            stack.callback(layer.register_forward_pre_hook(tally.before_forward, with_kwargs=True).remove)
            vars(layer)["forward_rows"] = tally.forward_rows  # attention calls this method, which runs no hook
            stack.callback(vars(layer).pop, "forward_rows")
        yield


def input_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a layer's call, positional or by keyword.

    Raises:
        TypeError: it is not a tensor, or there is none.
    """
    given = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(given, Tensor):
        raise TypeError(f"the layer was called with a {type(given).__name__}, not a tensor")
    return given


def values_of(x: Tensor) -> Tensor:
    """``x``; of a nested tensor, the tokens of all its parts in one tensor."""
    return torch.cat(x.unbind()) if x.is_nested else x


class _Tally:
    """Counts the calls of one layer."""

    def __init__(self, layer: QuantizedLinear, calls: Counter[Call]) -> None:
        self._calls, self._forward_rows = calls, layer.forward_rows

    def before_forward(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        try:
            x = input_of(args, kwargs)
        except TypeError:  # for the layer itself to refuse
            return
        if not x.is_nested:  # for a nested tensor the layer calls itself with the tokens
            self._note(x, None)

    def forward_rows(self, input: Tensor, rows: slice) -> Tensor:
        self._note(input, (rows.start, rows.stop))
        return self._forward_rows(input, rows)

    def _note(self, x: Tensor, part: tuple[int | None, int | None] | None) -> None:
        device = x.device.type
        on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        autocast = torch.get_autocast_dtype(device) if on else None
        self._calls[Call(x.shape[:-1].numel(), x.dtype, autocast, str(x.device), part)] += 1


def representative(calls: Mapping[Call, int]) -> dict[Call, float]:
    """Calls to time that stand for all of ``calls``, each with its weight.

    Calls are grouped by their rows, those within the same power of two together and those above
    :data:`MAX_ROWS` taken as that many; the most frequent call of a group stands for it. So a handful of
    calls stand for an evaluation with any number of lengths.

    Returns:
        The weight by call: the rows of its group over its own rows.
    """
    classes: dict[Call, Counter[Call]] = defaultdict(Counter)
    for call, count in calls.items():
        if call.rows:
            classes[replace(call, rows=min(call.rows, MAX_ROWS).bit_length())][call] += count
    found = {}
    for alike in classes.values():
        most = max(alike, key=lambda call: (alike[call], call.rows))
        timed = replace(most, rows=min(most.rows, MAX_ROWS))
        found[timed] = sum(call.rows * count for call, count in alike.items()) / timed.rows
    return found
