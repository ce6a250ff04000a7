"""What the weights of recurrent layers are multiplied with: a float64 walk, step by step, gives the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from tinyq_lightning.layers import KINDS

(KIND,) = (kind for kind in KINDS if kind.name == "recurrent")


def inputs_of(layer, *args, **kwargs):
    with torch.no_grad():
        return dict(KIND.weight_inputs(layer, args, kwargs))


def walk(layer, x, states, end, backwards):
    """Hidden state before each step of one sequence ``[steps, features]``, what is projected, and the outputs."""
    weights = {name.removesuffix(end): value for name, value in layer.named_parameters() if name.endswith(end)}
    weights = {name: value for name, value in weights.items() if name.count("_") == 1}
    hidden, *cells = states
    before, whole, outputs = {}, {}, {}
    for step in reversed(range(len(x))) if backwards else range(len(x)):
        before[step] = hidden
        ih = nn.functional.linear(x[step], weights["weight_ih"], weights.get("bias_ih"))
        hh = nn.functional.linear(hidden, weights["weight_hh"], weights.get("bias_hh"))
        if layer.mode == "LSTM":
            given, kept, new, shown = (ih + hh).chunk(4)
            cells = [kept.sigmoid() * cells[0] + given.sigmoid() * new.tanh()]
            hidden = whole[step] = shown.sigmoid() * cells[0].tanh()
            if layer.proj_size:
                hidden = weights["weight_hr"] @ hidden
        elif layer.mode == "GRU":
            (ir, iz, i), (hr, hz, h) = ih.chunk(3), hh.chunk(3)
            kept = (iz + hz).sigmoid()
            hidden = (1 - kept) * (i + (ir + hr).sigmoid() * h).tanh() + kept * hidden
        else:
            hidden = (ih + hh).tanh() if layer.mode == "RNN_TANH" else (ih + hh).relu()
        outputs[step] = hidden
    return *(torch.stack([each[step] for step in range(len(x))]) if each else None for each in (before, whole)), outputs


@pytest.mark.parametrize("given", ["batch", "batch first", "unbatched", "packed", "packed unsorted"])
@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (nn.RNN, {"nonlinearity": "relu"}),
        (nn.RNN, {"bidirectional": True, "bias": False}),
        (nn.GRU, {"num_layers": 2, "bidirectional": True}),
        (nn.LSTM, {"num_layers": 2, "dropout": 0.5}),
        (nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    ],
)
@pytest.mark.parametrize("with_hidden", [False, True])
def test_inputs_and_hidden_states_are_those_of_a_walk_step_by_step(make, settings, given, with_hidden):
    torch.manual_seed(0)
    layer = make(4, 5, batch_first=given == "batch first", **settings).double().eval()
    lengths = [6] if given == "unbatched" else [4, 6, 3] if given == "packed unsorted" else [6, 4, 3]
    lengths = [6] * 3 if given.startswith("batch") else lengths
    sequences = [torch.randn(length, 4, dtype=torch.float64) for length in lengths]
    ends = ["", "_reverse"][: 2 if layer.bidirectional else 1]
    sizes = [settings.get("proj_size", 5), 5][: 2 if make is nn.LSTM else 1]
    states = [torch.randn(layer.num_layers * len(ends), len(lengths), size, dtype=torch.float64) for size in sizes]
    states = states if with_hidden else [torch.zeros_like(each) for each in states]
    if given.startswith("packed"):
        x = pack_sequence(sequences, enforce_sorted=given == "packed")
    else:
        x = sequences[0] if given == "unbatched" else torch.stack(sequences, 0 if layer.batch_first else 1)
    hidden = tuple(each[:, 0] if given == "unbatched" else each for each in states)
    hidden = hidden if make is nn.LSTM else hidden[0]

    found = inputs_of(layer, x, hx=hidden) if with_hidden else inputs_of(layer, input=x)

    order = x.sorted_indices.tolist() if given == "packed unsorted" else range(len(lengths))
    expected = {name: [] for name in found}
    for at in order:
        x = sequences[at]
        for index in range(layer.num_layers):
            outs = []
            for direction, end in enumerate(ends):
                own = [each[len(ends) * index + direction, at] for each in states]
                before, whole, out = walk(layer, x, own, f"_l{index}{end}", backwards=bool(end))
                for name, each in (("ih", x), ("hh", before), ("hr", whole)):
                    if f"weight_{name}_l{index}{end}" in expected:
                        expected[f"weight_{name}_l{index}{end}"].append(each)
                outs.append(torch.stack([out[step] for step in range(len(x))]))
            x = torch.cat(outs, 1)
    assert {*found} == {*KIND.sizes(layer)}
    for name, each in expected.items():
        torch.testing.assert_close(found[name], torch.cat(each)[None], msg=name)


@pytest.mark.parametrize("make", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
@pytest.mark.parametrize("batched", [True, False])
def test_a_cell_is_given_its_inputs_and_the_hidden_state(make, batched):
    layer = make(4, 5)
    x, state = (torch.randn(3, size) if batched else torch.randn(size) for size in (4, 5))
    given = (state, torch.randn_like(state)) if make is nn.LSTMCell else state

    found, without = inputs_of(layer, x, given), inputs_of(layer, x)

    assert torch.equal(found["weight_ih"], x.reshape(1, -1, 4))
    assert torch.equal(found["weight_hh"], state.reshape(1, -1, 5))
    assert torch.equal(without["weight_hh"], torch.zeros_like(found["weight_hh"]))


def test_inputs_of_another_dtype_and_no_inputs_are_taken():
    layer = nn.GRU(4, 5)
    found = inputs_of(layer, torch.randn(6, 2, 4, dtype=torch.bfloat16))
    assert {each.dtype for each in found.values()} == {torch.float32}
    assert inputs_of(layer, torch.randn(6, 0, 4)) == {}
