"""Recurrent layers of four bits with ``kernel: compact``: two codes a byte, and the bits of those that expand once."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from tinyq_lightning import quantize

# torch says so of each LSTM with projections
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

LAYERS = [
    lambda: nn.LSTM(7, 40, num_layers=2, bidirectional=True, batch_first=True),
    lambda: nn.LSTM(33, 40, proj_size=5),
    lambda: nn.GRU(31, 36, bias=False),
    lambda: nn.RNN(9, 33),
    lambda: nn.GRUCell(70, 40),
    lambda: nn.LSTMCell(9, 33, bias=False),
]


def first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.fixture(params=range(len(LAYERS)))
def pair(request):
    """The same layer expanded, and packed, each in a model; and an input."""
    torch.manual_seed(0)
    net = nn.Sequential(LAYERS[request.param]()).eval()
    packed = copy.deepcopy(net)
    quantize(net, {"method": "w4a32"})
    plan = quantize(packed, {"method": "w4a32", "kernel": "compact"})
    assert plan.decisions[0].memory_bytes <= 1.2 * plan.decisions[0].bytes
    shape = (5, 70) if isinstance(net[0], nn.GRUCell) else (5, net[0].input_size)
    return net, packed, torch.randn(shape)


@torch.no_grad()
def test_packed_codes_take_half_a_byte_and_have_the_same_bits(pair):
    net, packed, x = pair
    assert torch.equal(first(packed(x)), first(net(x)))
    held = {name.rpartition("_int")[2]: buffer for name, buffer in packed.named_buffers() if "_int" in name}
    assert {*held} == {"4_weights"}
    assert sum(each.nbytes for each in packed[0].buffers()) < 0.8 * sum(each.nbytes for each in net[0].buffers())
    assert packed[0].choice.kernel == "int4"
    assert torch.equal(packed[0].weight_hh if "Cell" in str(net) else packed[0].weight_hh_l0, weight_hh(net[0]))


def weight_hh(layer):
    return layer.weight_hh if "Cell" in type(layer).__name__ else layer.weight_hh_l0


@torch.no_grad()
def test_packed_codes_outlast_files_copies_casts_and_another_kernel(pair):
    net, packed, x = pair
    wanted, state = first(net(x)), net.state_dict()
    assert state.keys() == packed.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in packed.state_dict().items())
    for each in packed.buffers():
        each.zero_() if each.dtype == torch.float32 else None
    packed.load_state_dict(state)
    for again in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), packed.double().float()):
        assert torch.equal(first(again(x)), wanted)
        assert any("_int4_weights" in name for name, _ in again.named_buffers())
    packed[0].kernel = "auto"
    assert torch.equal(first(packed(x)), wanted)
    assert any("_int8_weights" in name for name, _ in packed.named_buffers())
    assert packed[0].share(net[0]) is packed[0]
    packed[0].kernel = "compact"
    assert torch.equal(first(packed(x)), wanted)


@torch.no_grad()
def test_programs_have_packed_codes_too(pair):
    net, packed, x = pair
    program = torch.export.export(packed, (x,), strict=False).module()
    torch.testing.assert_close(first(program(x)), first(net(x)))


@pytest.mark.parametrize("make", [lambda: nn.GRU(4, 8), lambda: nn.Linear(40, 8)])
def test_damaged_multipliers_are_refused_and_codes_stay(make):
    net = nn.Sequential(make())
    quantize(net, {"method": "w4a32", "kernel": "compact"})
    state = {name: value.clone() for name, value in net.state_dict().items()}
    name = next(name for name in state if name.endswith("multipliers"))
    with pytest.raises(RuntimeError, match=f"{name} holds a zero"):
        net.load_state_dict(state | {name: torch.zeros_like(state[name])})
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
