"""What the weights of a recurrent layer are multiplied with: its inputs, and its hidden state from step to step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tinyq_lightning.layers.computed import float_weight

__all__ = [
    "inner_calls",
    "step_inputs",
]

_RUN = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}


def inner_calls(layer: Any, base: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """The input and the hidden state of each call of torch's forward in a call of a layer.

    Args:
        layer: float. One with a forward of its own is called again, to see what that gives to torch's.
        base: torch's class.
        args: of the call.
        kwargs: of the call.
    """
    own: Any = type(layer)
    if own.forward is base.forward:
        return [_as_torchs(*args, **kwargs)]
    calls: list[tuple[Any, Any]] = []

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(_as_torchs(*args, **kwargs))
        return base.forward(self, *args, **kwargs)

    watched: Any = object.__new__(type(own.__name__, (own, type(base.__name__, (base,), {"forward": forward})), {}))
    vars(watched).update(vars(layer))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        own.forward(watched, *args, **kwargs)
    return calls


def _as_torchs(input: Any, hx: Any = None) -> tuple[Any, Any]:
    return input, hx


def step_inputs(layer: Any, input: Any, hx: Any = None) -> Iterator[tuple[str, Tensor]]:
    """The inputs and hidden states of a call, by the weight that they are multiplied with; without dropout.

    Hidden states inside the layer are computed anew, layer by layer, by torch's own functions.

    Args:
        layer: float.
        input: of the call, a packed sequence too.
        hx: the hidden state that it was called with, or None.

    Yields:
        The name of a weight, and ``[places, columns]``, those of one sequence after those of the other.
    """
    hidden = hx if hx is None or isinstance(hx, tuple) else (hx,)
    if isinstance(layer, nn.RNNCellBase):
        state = input.new_zeros(*input.shape[:-1], layer.hidden_size) if hidden is None else hidden[0]
        yield "weight_ih", input.reshape(-1, layer.input_size)
        yield "weight_hh", state.reshape(-1, layer.hidden_size)
        return
    steps = _steps_of(layer, input)
    states, dtype = _states_of(layer, input, hidden, steps), steps.values.dtype
    for index in range(layer.num_layers):
        ends = ("", "_reverse")[: 2 if layer.bidirectional else 1]
        own = [_weights_of(layer, f"_l{index}{end}", dtype) for end in ends]
        some = slice(len(ends) * index, len(ends) * (index + 1))
        before = tuple(state[some].contiguous() for state in states)
        outputs = _run(layer, steps, before, [each for weights in own for each in weights.values()])
        for direction, (end, weights, out) in enumerate(zip(ends, own, outputs.chunk(len(ends), -1), strict=True)):
            first = [state[direction] for state in before]
            shifted = steps.shifted(out, first[0], backwards=bool(end))
            yield f"weight_ih_l{index}{end}", steps.by_sequence(steps.values)
            yield f"weight_hh_l{index}{end}", steps.by_sequence(shifted)
            if layer.proj_size:
                whole = _before_projection(steps, weights, shifted, first[1], backwards=bool(end))
                yield f"weight_hr_l{index}{end}", steps.by_sequence(whole)
        steps = _Steps(outputs, steps.sizes)


@dataclass(frozen=True)
class _Steps:
    """Sequences step by step, the longest first.

    Attributes:
        values: ``[places, features]``, all places of the first step, then those of the second, and so on.
        sizes: how many sequences have each step, ``[steps]`` int64 on the CPU.
    """

    values: Tensor
    sizes: Tensor

    def ranges(self, backwards: bool) -> Iterator[tuple[int, int]]:
        """Where each step begins and ends among the places, in the order of the computation."""
        ends = self.sizes.cumsum(0).tolist()
        pairs = list(zip([0, *ends[:-1]], ends, strict=True))
        yield from reversed(pairs) if backwards else pairs

    def shifted(self, out: Tensor, first: Tensor, backwards: bool) -> Tensor:
        """The hidden state that each place begins with: the output at the step before, or the ``first`` state."""
        before, last = torch.empty_like(out), first[:0]
        for start, stop in self.ranges(backwards):
            before[start:stop] = _continued(last, first, stop - start)
            last = out[start:stop]
        return before

    def by_sequence(self, x: Tensor) -> Tensor:
        """``[places, …]`` in the order of the sequences."""
        sequence = torch.cat([torch.arange(int(size)) for size in self.sizes])
        return x[sequence.argsort(stable=True).to(x.device)]


def _continued(last: Tensor, first: Tensor, count: int) -> Tensor:
    """The states of as many sequences: those that had a step go on from it, the others begin."""
    return torch.cat([last[:count], first[len(last) : count]])


def _steps_of(layer: Any, given: Any) -> _Steps:
    if isinstance(given, PackedSequence):
        return _Steps(given.data.to(_dtype(layer)), given.batch_sizes)
    x = given[:, None] if given.dim() == 2 else given.transpose(0, 1) if layer.batch_first else given
    return _Steps(x.flatten(0, 1).to(_dtype(layer)), torch.full((len(x),), x.shape[1]))


def _states_of(layer: Any, given: Any, hidden: Any, steps: _Steps) -> tuple[Tensor, ...]:
    """The first hidden states, ``[layers * directions, sequences, features]`` each; of an LSTM those of cells too."""
    count, batch = layer.num_layers * (2 if layer.bidirectional else 1), int(steps.sizes[0])
    if hidden is None:
        features = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 2 if layer.mode == "LSTM" else 1]
        return tuple(steps.values.new_zeros(count, batch, each) for each in features)
    order = given.sorted_indices if isinstance(given, PackedSequence) else None
    states = (each.to(steps.values.dtype).reshape(count, batch, -1) for each in hidden)
    return tuple(each if order is None else each[:, order] for each in states)


def _dtype(layer: Any) -> torch.dtype:
    return float_weight(layer, "weight_hh_l0").dtype


def _weights_of(layer: Any, end: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights and biases of one direction of one layer, in the order in which torch's functions take them."""
    names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if layer.bias else [])]
    names += ["weight_hr"] if layer.proj_size else []
    return {name: float_weight(layer, name + end).detach().to(dtype) for name in names}


def _run(layer: Any, steps: _Steps, before: tuple[Tensor, ...], weights: Sequence[Tensor]) -> Tensor:
    """The outputs of one layer ``[places, directions * features]``."""
    states = before if layer.mode == "LSTM" else before[0]
    settings = layer.bias, 1, 0.0, False, layer.bidirectional
    with warnings.catch_warnings():  # cuDNN tells that it joins weights that lie apart
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
        return _RUN[layer.mode](steps.values, steps.sizes, states, weights, *settings)[0]  # type: ignore[operator, no-any-return]


def _before_projection(
    steps: _Steps, weights: dict[str, Tensor], shifted: Tensor, first: Tensor, backwards: bool
) -> Tensor:
    """What an LSTM multiplies with its projection, ``[places, hidden]``."""
    products = nn.functional.linear(steps.values, weights["weight_ih"], weights.get("bias_ih"))
    gates = products + nn.functional.linear(shifted, weights["weight_hh"], weights.get("bias_hh"))
    made, cells = gates.new_empty(len(gates), gates.shape[1] // 4), first[:0]
    for start, stop in steps.ranges(backwards):
        given, kept, new, shown = gates[start:stop].chunk(4, -1)
        cells = kept.sigmoid() * _continued(cells, first, stop - start) + given.sigmoid() * new.tanh()
        made[start:stop] = shown.sigmoid() * cells.tanh()
    return made
