"""How long layers take in float and quantized at the row counts of the user's own evaluation, and which stay float.

Layers alone are timed, not what lies between them. Layers of one shape take turns, as they do in the
model: a layer that is called repeatedly keeps its weights in cache, which shortens float more than int8 or int4.
"""

from __future__ import annotations

import copy
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import nn

from tinyq_lightning.layers import QuantizedLayer, QuantizedLinear, kind_of, methods_of
from tinyq_lightning.plan import Swap
from tinyq_lightning.search.layer_calls import Call, counted_calls, representative
from tinyq_lightning.search.timer import Run, Timing, brief, evaluating, time_in_turns, timed

__all__ = [
    "ROUNDS",
    "SECONDS",
    "SPEEDUP_LOST",
    "Shape",
    "Stopwatch",
    "left_float",
    "time_call",
]

SPEEDUP_LOST = 0.95
"""Float time over the quantized time below which the latter has lost; what lies nearer to 1 is noise."""


SECONDS = 0.03
"""Processor time for one shape and call, unless a warm-up and :data:`ROUNDS` rounds take longer."""


ROUNDS = 5
"""The least number of rounds, float and quantized in turn; small layers have hundreds in their time."""


# The most layers of one shape that take turns; fewer if their calls are too long for the time.
_TURNS = 8


# On a busy machine a shape may take its processor time this many times over.
_PATIENCE = 10


@dataclass(frozen=True)
class Shape:
    """What layers have in common that take the same time.

    Attributes:
        kind: of the layer.
        layer: its sizes and settings, as ``print`` shows them.
        method: of the quantized layer.
        dtype: of the float weight.
    """

    kind: str
    layer: str
    method: str
    dtype: torch.dtype


Work = Sequence[tuple[float, Call, Timing]]
"""What a layer has to do: the weight of each call, the call, and the time that it takes."""


def left_float(work: Mapping[str, Work], ties: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, str]]:
    """The layers that are slower than float, each with ``float`` and the reason. Nothing is timed here.

    Args:
        work: by the name of the layer; a layer without any is not judged.
        ties: by the name of a layer, the names of those that share its weight. They are judged together,
            under the name of the first, by the sum of their times.
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
    float_ms = sum(weight * timing.float_ms for weight, _, timing in work)
    ms = sum(weight * timing.ms for weight, _, timing in work)
    if float_ms >= SPEEDUP_LOST * ms:
        return None
    rows = sorted({call.rows for _, call, _ in work})
    if any(call.sizes for _, call, _ in work):
        sizes = max((weight, call.sizes) for weight, call, _ in work)[1]
        return f"left float: quantized, it took {ms / float_ms:.2f}x the time of float at {list(sizes)}, measured here"
    span = f"{rows[0]} to {rows[-1]}" if len(rows) > 1 else f"{rows[0]}"
    unit = "row" if rows[-1] == 1 else "rows"
    return f"left float: quantized, it took {ms / float_ms:.2f}x the time of float at {span} {unit}, measured here"


class Stopwatch:
    """Counts how the layers of a model are called, and times each distinct shape and call once.

    Attributes:
        calls: how often each layer was called in which way, by its name; empty until one was watched.
        timings: by shape and call, in the order of their measurement.
        not_timed: why, by each shape and call that could not be timed; it is not judged.
        seconds: what all timing took.
    """

    def __init__(self) -> None:
        self.calls: dict[str, Counter[Call]] = {}
        self.seconds = 0.0
        self.timings: dict[tuple[Shape, Call], Timing] = {}
        self.not_timed: dict[tuple[Shape, Call], str] = {}

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

        Layers that were not called, or could not be timed, are not judged.

        Returns:
            The changes, with their reasons, for :meth:`Swap.switched`.
        """
        start = time.perf_counter()
        alike: dict[Shape, list[tuple[nn.Module, QuantizedLayer]]] = defaultdict(list)
        shapes = {}
        # of those that share a weight, the one of most methods gives the change its name
        for name, module, layer in sorted(swap.called(), key=lambda pair: -len(methods_of(pair[2]))):
            shape = shapes[name] = _shape(layer)
            alike[shape].append((module, layer))
        work = {
            name: [
                (weight, call, timing)
                for call, weight in representative(self.calls.get(name, {})).items()
                if (timing := self._timing(shape, call, alike[shape]))
            ]
            for name, shape in shapes.items()
        }
        self.seconds += time.perf_counter() - start
        return left_float(work, swap.ties())

    def _timing(self, shape: Shape, call: Call, layers: Sequence[tuple[nn.Module, QuantizedLayer]]) -> Timing | None:
        key = (shape, call)
        if key not in self.timings and key not in self.not_timed:
            try:
                self.timings[key] = Timing(*time_call(layers, call))
            except Exception as error:  # out of memory, an operator that the device lacks, an input that no layer takes
                self.not_timed[key] = brief(error)
        return self.timings.get(key)

    def to_dict(self) -> dict[str, Any]:
        """What was timed and what could not be, and with how many threads, as plain data."""
        timings = [
            asdict(shape) | {"input": asdict(call)} | timing._asdict() for (shape, call), timing in self.timings.items()
        ]
        not_timed = [
            asdict(shape) | {"input": asdict(call), "reason": reason}
            for (shape, call), reason in self.not_timed.items()
        ]
        content = {"seconds": self.seconds, "threads": torch.get_num_threads(), "timings": timings}
        plain: dict[str, Any] = _plain(content | ({"not_timed": not_timed} if not_timed else {}))
        return plain


def _shape(layer: QuantizedLayer) -> Shape:
    kind = kind_of(layer)
    return Shape(kind.name if kind else "", layer.extra_repr(), layer.method, layer.dtype)


def time_call(layers: Sequence[tuple[nn.Module, QuantizedLayer]], call: Call) -> Timing:
    """Median milliseconds of one call, of the float and of the quantized layer, in eval and inference mode.

    Float and quantized take turns call by call, and so do the layers. A busy machine distorts neither: the time
    to spend is processor time, a median of short calls leaves out the few that were interrupted, and what
    looks slower than float is timed a second time: other load only adds time, so the shorter medians count. No
    global random state is used, and the layers are left as they are.

    Args:
        layers: of one shape, float and quantized.
        call: what they are called with; ``device`` is where they are timed.
    """
    with evaluating(*chain.from_iterable(layers)):
        return _time_call(layers, call)


def _time_call(layers: Sequence[tuple[nn.Module, QuantizedLayer]], call: Call) -> Timing:
    with torch.inference_mode(False), torch.no_grad():  # what a layer keeps from its first call must outlast this
        inputs = _inputs(layers[0][1], call)
        pairs = [_runs(*layers[0], inputs, call)]
        warm = [sum(timed(run, call.device)[1] for run in pairs[0]) for _ in range(2)]
        for module, layer in layers[1 : min(_TURNS, int(SECONDS / ROUNDS / warm[1]))]:
            pairs.append(_runs(module, layer, inputs, call))
            for run in pairs[-1]:
                run()
    with torch.inference_mode():
        timing = time_in_turns(pairs, _until_spent(), call.device)
        if timing.float_ms < SPEEDUP_LOST * timing.ms:
            again = time_in_turns(pairs, _until_spent(), call.device)
            timing = Timing(min(timing.float_ms, again.float_ms), min(timing.ms, again.ms))
    return timing


def _until_spent() -> Callable[[int], bool]:
    """Whether there is time for another round: processor time, or on a busy machine some multiple of it."""
    busy, start = time.thread_time(), time.perf_counter()

    def more(rounds: int) -> bool:
        spent, passed = time.thread_time() - busy, time.perf_counter() - start
        return rounds < ROUNDS or (spent < SECONDS and passed < _PATIENCE * SECONDS)

    return more


def _inputs(layer: QuantizedLayer, call: Call) -> tuple[Any, ...]:
    kind, generator = kind_of(layer), torch.Generator().manual_seed(0)
    assert kind is not None
    made = kind.example(layer, call.rows, call.sizes, call.dtype, generator)
    return tuple(each.to(call.device) if hasattr(each, "to") else each for each in made)


def _runs(module: nn.Module, layer: QuantizedLayer, inputs: tuple[Any, ...], call: Call) -> tuple[Run, Run]:
    """The call, of the float and of the quantized layer, without the users' hooks."""
    kind = kind_of(layer)
    assert kind is not None
    plain = kind.plain(module)
    if layer.device != torch.device(call.device):  # after a fit, Lightning has the model on the CPU
        plain, layer = copy.deepcopy(plain).to(call.device), copy.deepcopy(layer).to(call.device)
    if call.part is None:
        runs = partial(plain.forward, *inputs), partial(layer.forward, *inputs)
    else:
        rows, linear, projection = slice(*call.part), cast(nn.Linear, plain), cast(QuantizedLinear, layer)
        bias = None if linear.bias is None else linear.bias[rows]
        part = partial(nn.functional.linear, inputs[0], linear.weight[rows], bias)
        runs = part, partial(projection.forward_rows, inputs[0], rows)
    return _as_called(runs[0], call), _as_called(runs[1], call)


def _as_called(run: Run, call: Call) -> Run:
    """``run`` under the autocast of the call."""
    if call.autocast is None:
        return run

    def under_autocast() -> Any:
        # no cache of cast weights: the model casts each once in a step
        with torch.autocast(torch.device(call.device).type, call.autocast, cache_enabled=False):
            return run()

    return under_autocast


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
