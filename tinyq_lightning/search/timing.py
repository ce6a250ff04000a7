"""How long layers take in float and in int8 at the row counts of the user's own evaluation, and which stay float.

Layers alone are timed, not what lies between them. Layers of one shape take turns, as they do in the
model: one that is called again and again keeps its weights in cache, which flatters float.
"""

from __future__ import annotations

import copy
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from tinyq_lightning.layers import QuantizedLinear, float_weight, linear_with
from tinyq_lightning.plan import Swap
from tinyq_lightning.search.layer_calls import Call, counted_calls, representative

__all__ = [
    "ROUNDS",
    "SECONDS",
    "SPEEDUP_LOST",
    "Shape",
    "Stopwatch",
    "Timing",
    "left_float",
    "time_call",
]

SPEEDUP_LOST = 0.95
"""Float time over int8 time below which int8 has lost; what lies nearer to 1 is noise."""


SECONDS = 0.03
"""Processor time for one shape and call, unless a warm-up and :data:`ROUNDS` rounds take longer."""


ROUNDS = 5
"""At least so many rounds, float and int8 in turn; small layers have hundreds in their time."""


# Layers of one shape that take turns, where so many fit into the time.
_TURNS = 8


# How many times its processor time a shape may take on a machine that is busy with other things.
_PATIENCE = 10


@dataclass(frozen=True)
class Shape:
    """What layers have in common that take the same time.

    Attributes:
        in_features: size of each input row.
        out_features: size of each output row.
        bias: whether there is one.
        method: of the quantized layer.
        dtype: of the float weight.
    """

    in_features: int
    out_features: int
    bias: bool
    method: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Timing:
    """Medians of one call of layers of one shape.

    Attributes:
        shape: of the layers.
        call: what they were called with.
        float_ms: of ``nn.Linear``, in milliseconds.
        ms: of the quantized layer.
    """

    shape: Shape
    call: Call
    float_ms: float
    ms: float

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        content = asdict(self.shape) | {"input": asdict(self.call)} | {"float_ms": self.float_ms, "ms": self.ms}
        return {key: _plain(value) for key, value in content.items()}


_Run = Callable[[], Tensor]


Work = Sequence[tuple[float, Timing]]
"""What a layer has to do: how often each call comes, and what it takes."""


def left_float(work: Mapping[str, Work], ties: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, str]]:
    """The layers that int8 makes slower, each with ``float`` and the reason. Nothing is timed here.

    Args:
        work: by the name of the layer; those without any are not judged.
        ties: names of those that share a weight with a layer. They are judged together, under the name
            of the first, by the sum of their times.
    """
    changes: dict[str, tuple[str, str]] = {}
    judged: set[str] = set()
    for name in work:
        if name not in judged:
            together = [name, *(other for other in ties.get(name, ()) if other in work)]
            judged.update(together)
            if reason := _why_slower([each for member in together for each in work[member]]):
                changes[name] = ("float", reason)
    return changes


def _why_slower(work: Work) -> str | None:
    float_ms = sum(weight * timing.float_ms for weight, timing in work)
    ms = sum(weight * timing.ms for weight, timing in work)
    if float_ms >= SPEEDUP_LOST * ms:
        return None
    rows = sorted({timing.call.rows for _, timing in work})
    span = f"{rows[0]} to {rows[-1]}" if len(rows) > 1 else f"{rows[0]}"
    unit = "row" if rows[-1] == 1 else "rows"
    return f"left float: int8 took {ms / float_ms:.2f}x the time of float at {span} {unit}, measured here"


class Stopwatch:
    """Counts how the layers of a model are called, and times each distinct shape and call once.

    Attributes:
        calls: how often each layer was called in which way, by its name; empty until one was watched.
        seconds: what all timing took.
    """

    def __init__(self) -> None:
        self.calls: dict[str, Counter[Call]] = {}
        self.seconds = 0.0
        self._timings: dict[tuple[Shape, Call], Timing] = {}

    @property
    def timings(self) -> list[Timing]:
        """In the order of their measurement."""
        return list(self._timings.values())

    @property
    def saw_all(self) -> bool:
        """Whether each layer that was watched was called, and there was one."""
        return bool(self.calls) and all(self.calls.values())

    @contextmanager
    def watching(self, swap: Swap) -> Iterator[None]:
        """Count the calls of the layers of ``swap`` in the block; see :func:`counted_calls`."""
        with counted_calls(swap, self.calls):
            yield

    def slower(self, swap: Swap) -> dict[str, tuple[str, str]]:
        """Of the layers of ``swap``, those to leave float; what has not been timed yet is timed.

        Layers that were not called are not judged.

        Returns:
            The changes, with their reasons, for :meth:`Swap.switched`.
        """
        start = time.perf_counter()
        alike: dict[Shape, list[tuple[nn.Linear, QuantizedLinear]]] = defaultdict(list)
        shapes = {}
        for name, module, layer in swap.pairs():
            shape = shapes[name] = _shape(layer)
            alike[shape].append((module, layer))
        work = {
            name: [
                (weight, self._timing(shape, call, alike[shape]))
                for call, weight in representative(self.calls.get(name, {})).items()
            ]
            for name, shape in shapes.items()
        }
        self.seconds += time.perf_counter() - start
        return left_float(work, swap.ties())

    def _timing(self, shape: Shape, call: Call, layers: Sequence[tuple[nn.Linear, QuantizedLinear]]) -> Timing:
        key = (shape, call)
        if key not in self._timings:
            self._timings[key] = Timing(shape, call, *time_call(layers, call))
        return self._timings[key]

    def to_dict(self) -> dict[str, Any]:
        """What was timed, and with how many threads, as plain data."""
        return {
            "seconds": self.seconds,
            "threads": torch.get_num_threads(),
            "timings": [timing.to_dict() for timing in self.timings],
        }


def _shape(layer: QuantizedLinear) -> Shape:
    return Shape(layer.in_features, layer.out_features, layer.bias is not None, layer.method, layer.dtype)


def time_call(layers: Sequence[tuple[nn.Linear, QuantizedLinear]], call: Call) -> tuple[float, float]:
    """Median milliseconds of one call, of the float and of the quantized layer, in inference mode.

    Float and int8 take turns call by call, so that the machine's moods meet both, and so do the layers. What
    a busy machine takes away counts for neither: the time to spend is processor time, and a median of short
    calls does not see the few that were interrupted. No global random state is used, and the layers are left
    as they are.

    Args:
        layers: of one shape, float and quantized.
        call: what they are called with; ``device`` is where they are timed.
    """
    with torch.inference_mode(False), torch.no_grad():  # what a layer keeps from its first call is to last
        values = torch.randn(call.rows, layers[0][0].in_features, generator=torch.Generator().manual_seed(0))
        x = values.to(call.device, call.dtype)
        runs = [_runs(*layers[0], x, call)]
        warm = [sum(_seconds(run, call) for run in runs[0]) for _ in range(2)]
        for module, layer in layers[1 : min(_TURNS, int(SECONDS / ROUNDS / warm[1]))]:
            runs.append(_runs(module, layer, x, call))
            for run in runs[-1]:
                _seconds(run, call)
    taken: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        busy, start = time.thread_time(), time.perf_counter()
        while len(taken[0]) < ROUNDS * len(runs) or (
            time.thread_time() - busy < SECONDS and time.perf_counter() - start < _PATIENCE * SECONDS
        ):
            for pair in runs:
                for run, seconds in zip(pair, taken, strict=True):
                    seconds.append(_seconds(run, call))
    return 1000 * median(taken[0]), 1000 * median(taken[1])


def _runs(module: nn.Linear, layer: QuantizedLinear, x: Tensor, call: Call) -> tuple[_Run, _Run]:
    """The call, of the float and of the quantized layer, without the users' hooks."""
    weight, bias = float_weight(module).detach(), module.bias
    if layer.scales.device != torch.device(call.device):  # after a fit, Lightning has the model on the CPU
        weight, layer = weight.to(call.device), copy.deepcopy(layer).to(call.device)
        bias = None if bias is None else nn.Parameter(bias.detach().to(call.device), requires_grad=False)
    if call.part is None:
        return partial(linear_with(weight, bias).forward, x), partial(layer.forward, x)
    rows = slice(*call.part)

    def float_rows() -> Tensor:
        return nn.functional.linear(x, weight[rows], None if bias is None else bias[rows])

    return float_rows, partial(layer.forward_rows, x, rows)


def _seconds(run: _Run, call: Call) -> float:
    device = torch.device(call.device).type
    wait = _nothing if device == "cpu" else getattr(torch, device).synchronize
    # no cache of cast weights: the model has each cast once in a step
    autocast = torch.autocast(device, call.autocast, cache_enabled=False) if call.autocast else nullcontext()
    with autocast:
        wait()
        start = time.perf_counter()
        run()
        wait()
        return time.perf_counter() - start


def _nothing() -> None:
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
