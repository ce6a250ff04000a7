"""Recurrent layers as the float LSTM, GRU and RNN of ONNX, whose weights come from DequantizeLinear."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tinyq_lightning.errors import ExportError
from tinyq_lightning.handover.onnx_operators import dequantize_linear, dequantized_product, onnx_operators
from tinyq_lightning.kernels import is_exporting
from tinyq_lightning.layers import QuantizedRecurrent

__all__ = [
    "CellForm",
    "RecurrentForm",
    "SequenceForm",
]

# The places of ONNX's gates among torch's: input, output, forget, cell; and update, reset, hidden.
_GATE_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


class RecurrentForm(QuantizedRecurrent):
    """A layer whose weights, where its forward reads them, are DequantizeLinear of their codes."""

    def weight_of(self, name: str) -> Tensor:
        """A dequantized weight ``[rows, columns]`` in the layer's dtype."""
        if not is_exporting() or self.dtype == torch.float64:
            return super().weight_of(name)
        return dequantize_linear(*self.codes_of(name), axis=0).to(self.dtype)


class SequenceForm(RecurrentForm):
    """One operator a layer."""

    mode: str
    batch_first: bool
    bidirectional: bool
    hidden_size: int
    num_layers: int
    dropout: float
    proj_size: int
    bias: bool

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As the forward of torch's class."""
        known = isinstance(input, Tensor) and input.dtype != torch.float64
        if not (is_exporting() and known) or (self.training and self.dropout):
            return super().forward(input, hx)
        if self.proj_size:
            raise ExportError("the LSTM of ONNX has no projection of the hidden state, as proj_size asks for")
        batched, dtype = input.dim() == 3, input.dtype
        x = input.float() if batched else input.float().unsqueeze(0 if self.batch_first else 1)
        x = x.transpose(0, 1) if self.batch_first else x
        states = [None if each is None else each.float() for each in (hx if isinstance(hx, tuple) else (hx, None))]
        states = [each if batched or each is None else each.unsqueeze(1) for each in states]
        last: list[list[Tensor]] = []
        for index in range(self.num_layers):
            x, *ends = self._one_layer(index, x, states)
            last.append(ends)
        ends = [torch.cat(each).to(dtype) for each in zip(*last, strict=True)]
        x = x.transpose(0, 1) if self.batch_first else x
        if not batched:
            x, ends = x.squeeze(0 if self.batch_first else 1), [each.squeeze(1) for each in ends]
        return x.to(dtype), tuple(ends) if len(ends) == 2 else ends[0]

    def _one_layer(self, index: int, x: Tensor, states: list[Tensor | None]) -> list[Tensor]:
        """``x`` ``[T, N, in]`` → ``[T, N, directions · hidden]`` and the last states ``[directions, N, hidden]``."""
        operator, size = self.mode.partition("_")[0], self.hidden_size
        ends = (f"_l{index}", f"_l{index}_reverse")[: 1 + self.bidirectional]
        count, (steps, rows) = len(ends), x.shape[:2]
        weights = [self._stacked([f"weight_{part}{end}" for end in ends], operator) for part in ("ih", "hh")]
        first = [None if each is None else each[count * index : count * (index + 1)] for each in states]
        state = (torch.float32, (count, rows, size))
        outputs = [(torch.float32, (steps, count, rows, size)), state, *[state] * (operator == "LSTM")]
        inputs = [x, *weights, self._biases(ends, operator), None, first[0], *first[1:] * (operator == "LSTM")]
        attributes: dict[str, Any] = {"hidden_size": size}
        attributes |= {"direction": "bidirectional"} if self.bidirectional else {}
        attributes |= {"linear_before_reset": 1} if operator == "GRU" else {}
        attributes |= {"activations": [self.mode.partition("_")[2].capitalize()] * count} if operator == "RNN" else {}
        y, *last = onnx_operators(operator, _without_tail(inputs), outputs, **attributes)
        return [y.transpose(1, 2).reshape(steps, rows, count * size), *last]

    def _stacked(self, names: list[str], operator: str) -> Tensor:
        """A weight of each direction: ``[directions, gates · hidden, columns]`` float32, gates in ONNX's order."""
        codes, scales = zip(*(self.codes_of(name) for name in names), strict=True)
        order = _GATE_ORDER[operator]
        joint = torch.cat([_reordered(each, order) for each in codes])
        values = dequantize_linear(joint, torch.cat([_reordered(each, order) for each in scales]), axis=0)
        return values.reshape(len(names), -1, joint.shape[1])

    def _biases(self, ends: tuple[str, ...], operator: str) -> Tensor | None:
        if not self.bias:
            return None
        order = _GATE_ORDER[operator]
        names = [[f"bias_ih{end}", f"bias_hh{end}"] for end in ends]
        parts = [[_reordered(cast(Tensor, self._parameters[name]).float(), order) for name in each] for each in names]
        return torch.stack([torch.cat(each) for each in parts])


def _reordered(rows: Tensor, order: tuple[int, ...]) -> Tensor:
    size = len(rows) // len(order)
    return rows if len(order) == 1 else torch.cat([rows[size * place : size * (place + 1)] for place in order])


def _without_tail(inputs: list[Tensor | None]) -> list[Tensor | None]:
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    return inputs


class CellForm(RecurrentForm):
    """One step, its products as MatMul and Add."""

    hidden_size: int

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As the forward of torch's class."""
        if not is_exporting() or input.dtype == torch.float64:
            return super().forward(input, hx)
        if input.dim() == 1:
            states = None if hx is None else tuple(each[None] for each in hx) if isinstance(hx, tuple) else hx[None]
            out = self.forward(input[None], states)
            return tuple(each[0] for each in out) if isinstance(out, tuple) else out[0]
        x = input.float()
        zeros = x.new_zeros(x.shape[0], self.hidden_size)
        state = tuple(each.float() for each in hx) if isinstance(hx, tuple) else zeros if hx is None else hx.float()
        out = self._step(x, state, zeros)
        return tuple(each.to(input.dtype) for each in out) if isinstance(out, tuple) else out.to(input.dtype)

    def _step(self, x: Tensor, state: Any, zeros: Tensor) -> Any:
        if isinstance(self, nn.LSTMCell):
            hidden, cell = state if isinstance(state, tuple) else (zeros, zeros)
            i, f, g, o = (self._product("ih", x) + self._product("hh", hidden)).chunk(4, -1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            return o.sigmoid() * cell.tanh(), cell
        ours, theirs = self._product("ih", x), self._product("hh", state)
        if isinstance(self, nn.GRUCell):
            (r, z, n), (r_hidden, z_hidden, n_hidden) = ours.chunk(3, -1), theirs.chunk(3, -1)
            new, kept = (n + (r + r_hidden).sigmoid() * n_hidden).tanh(), (z + z_hidden).sigmoid()
            return new + kept * (state - new)
        return torch.relu(ours + theirs) if cast(Any, self).nonlinearity == "relu" else torch.tanh(ours + theirs)

    def _product(self, part: str, x: Tensor) -> Tensor:
        codes, scales = self.codes_of(f"weight_{part}")
        return dequantized_product(x, codes.t(), scales, self._parameters[f"bias_{part}"])
