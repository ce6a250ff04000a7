"""What the plan says of recurrent layers, and that taking them out leaves no trace."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from tinyq_lightning import quantize, quantized
from tinyq_lightning.errors import ModelError, SpecError
from tinyq_lightning.layers import (
    QuantizedGRU,
    QuantizedGRUCell,
    QuantizedLSTM,
    QuantizedLSTMCell,
    QuantizedRNN,
    QuantizedRNNCell,
)

SIZE = 24
QUANTIZED = {
    nn.RNN: QuantizedRNN,
    nn.LSTM: QuantizedLSTM,
    nn.GRU: QuantizedGRU,
    nn.RNNCell: QuantizedRNNCell,
    nn.LSTMCell: QuantizedLSTMCell,
    nn.GRUCell: QuantizedGRUCell,
}


class Last(nn.Module):
    """The last output of a recurrent layer, to a head."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(SIZE, 4)

    def forward(self, x):
        found = self.layer(x)
        return self.head(found[0] if isinstance(found, tuple) else found)


class OwnForward(nn.LSTM):
    def forward(self, input, hx=None):
        self.times = 2
        return super().forward(self.times * input, hx)


class OwnCheck(nn.GRU):
    def check_forward_args(self, input, hidden, batch_sizes):
        pass


class OwnSizes(nn.LSTM):
    """Does what torch's class does."""

    def __init__(self, size):
        super().__init__(size, size, batch_first=True)

    def reset_parameters(self):
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1)


def with_more():
    layer = nn.LSTM(SIZE, SIZE)
    layer.gain = nn.Parameter(torch.ones(SIZE))
    return layer


def hooked():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.LSTM(SIZE, SIZE), "weight_hh_l0")


def patched():
    layer = nn.GRUCell(SIZE, SIZE)
    layer.forward = lambda x: x
    return layer


def mixed():
    layer = nn.GRU(SIZE, SIZE)
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.detach().double())
    return layer


def of_another_shape():
    layer = nn.LSTM(SIZE, SIZE)
    layer.weight_hh_l0 = nn.Parameter(torch.randn(4, 4))
    return layer


FLOAT = {
    "own forward": (lambda: OwnForward(SIZE, SIZE), "OwnForward has a forward of its own"),
    "own method": (lambda: OwnCheck(SIZE, SIZE), "OwnCheck adds check_forward_args to nn.GRU"),
    "more": (with_more, "it holds gain besides its weight"),
    "hook": (hooked, "its weight is computed by the hook WeightNorm"),
    "patched": (patched, "its forward was replaced"),
    "mixed": (mixed, "its weights are of float32 and float64"),
    "shape": (of_another_shape, "its weight_hh_l0 is [4, 4] where its sizes tell of [96, 24]"),
    "small": (lambda: nn.RNN(1, 1), "int8 is no smaller: 10 bytes, 8 as float"),
}


@pytest.mark.parametrize("case", FLOAT)
def test_what_is_more_than_torchs_layer_stays_float_with_the_reason(case):
    make, reason = FLOAT[case]
    layer = make()
    with quantized(nn.ModuleDict({"layer": layer, "head": nn.Linear(SIZE, 4)}), "w8a32") as plan:
        found = plan.decisions[0]
        assert (found.name, found.kind, found.method) == ("layer", "recurrent", "float")
        assert found.reason == reason


@pytest.mark.parametrize("method", ["w8a32", "w8a16", "w8a8"])
@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.__name__)
def test_each_class_is_quantized_and_the_plan_never_calls_it_what_it_is_not(kind, method):
    model = Last(kind(SIZE, SIZE)).eval()
    x = torch.randn(5, SIZE)
    wanted, layer, flat = model(x), model.layer, list(vars(model.layer).get("_flat_weights", ()))
    before = copy.deepcopy(model.state_dict())
    with quantized(model, method) as plan:
        assert type(model.layer) is QUANTIZED[kind]
        assert isinstance(model.layer, kind)
        assert "_flat_weights" not in vars(model.layer), "float weights that nobody runs"
        assert torch.allclose(model(x), wanted, atol=0.05)
    found = plan.decisions[0]
    reason = "spec" if method == "w8a32" else "spec; recurrent layers take activations as they are"
    assert (found.method, found.reason, found.kind) == ("w8a32", reason, "recurrent")
    weights = [p for name, p in layer.named_parameters() if name.startswith("weight")]
    biases = 4 * sum(p.numel() for name, p in layer.named_parameters() if name.startswith("bias"))
    assert found.float_bytes == 4 * sum(p.numel() for p in weights) + biases
    assert found.bytes == sum(p.numel() + 4 * len(p) for p in weights) + biases
    assert 40 < found.weight_sqnr_db < 60
    assert model.layer is layer
    assert all(one is other for one, other in zip(vars(layer).get("_flat_weights", ()), flat, strict=True))
    assert torch.equal(model(x), wanted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_subclass_that_does_what_torchs_does_is_quantized():
    model = Last(OwnSizes(SIZE))
    x = torch.randn(2, 3, SIZE)
    wanted = model(x)
    quantize(model)
    assert type(model.layer) is QuantizedLSTM
    assert torch.allclose(model(x), wanted, atol=0.02)


def test_a_parametrized_weight_is_quantized_as_it_is_computed():
    model = Last(nn.utils.parametrizations.weight_norm(nn.LSTM(SIZE, SIZE, batch_first=True), "weight_hh_l0"))
    x = torch.randn(2, 3, SIZE)
    wanted, layer = model(x), model.layer
    with quantized(model, "w8a32") as plan:
        assert plan.decisions[0].method == "w8a32"
        assert torch.allclose(model(x), wanted, atol=0.02)
        assert not [name for name, _ in model.named_parameters() if "parametrizations" in name]
    assert model.layer is layer
    assert torch.equal(model(x), wanted)


def test_rules_excludes_and_kinds_reach_it():
    model = nn.ModuleDict({"enc": nn.LSTM(SIZE, SIZE), "dec": nn.GRUCell(SIZE, SIZE), "head": nn.Linear(SIZE, SIZE)})
    spec = {"method": "w8a8", "exclude": ["enc"], "rules": [{"match": "dec", "method": "w8a32"}]}
    with quantized(model, spec) as plan:
        assert {each.name: each.method for each in plan} == {"enc": "float", "dec": "w8a32", "head": "w8a8"}
        assert plan.decisions[1].reason == "rule 1"
    with quantized(model, {"method": "w8a8", "kinds": ["recurrent"]}) as plan:
        assert [each.method for each in plan if each.name == "enc"] == ["w8a32"]
        assert type(model["head"]) is nn.Linear
    with pytest.raises(SpecError, match="switched off"):
        quantize(model, {"method": "w8a8", "kinds": ["linear"], "exclude": ["enc"]})


@pytest.mark.parametrize("kernel", ["auto", "int8"])
def test_the_plan_says_what_a_float_copy_takes(kernel):
    model = Last(nn.LSTM(SIZE, SIZE))
    with quantized(model, {"method": "w8a32", "kernel": kernel}) as plan:
        assert model.layer.kernel == kernel
        model(torch.randn(3, SIZE))
        kept = model.layer._copies is not None
    assert plan.decisions[0].kernel == model_choice(kernel)
    assert kept == (kernel == "auto")
    note = "a float copy in memory" if kernel == "auto" else "one byte a weight in memory, expanded on each call"
    assert note in str(plan)


def model_choice(kernel):
    layer = QuantizedLSTM(nn.LSTM(SIZE, SIZE))
    layer.kernel = kernel
    return layer.choice


def test_layers_that_share_all_their_weights_share_their_codes():
    one, two = nn.GRU(SIZE, SIZE), nn.GRU(SIZE, SIZE)
    two.weight_ih_l0, two.weight_hh_l0 = one.weight_ih_l0, one.weight_hh_l0
    model = nn.ModuleList([one, two])
    x = torch.randn(3, SIZE)
    wanted = two(x)[0]
    plan = quantize(model)
    assert [each.tied_to for each in plan] == [None, "0"]
    assert all(a is b for a, b in zip(model[0].sources(), model[1].sources(), strict=True))
    assert torch.allclose(model[1](x)[0], wanted, atol=0.02)
    for moved in (model.bfloat16(), model.to("meta")):
        assert all(a is b for a, b in zip(moved[0].sources(), moved[1].sources(), strict=True))


def test_a_weight_that_only_a_part_is_shared_of_stays_float():
    one, two = nn.GRU(SIZE, SIZE), nn.GRU(SIZE, SIZE)
    two.weight_hh_l0 = one.weight_hh_l0
    with quantized(nn.ModuleList([one, two, nn.Linear(SIZE, SIZE)]), "w8a32") as plan:
        assert [each.method for each in plan] == ["float", "float", "w8a32"]
        assert plan.decisions[0].reason == "tied to 1.weight_hh_l0"


def test_a_model_that_is_one_itself_and_values_that_are_not_finite_are_refused():
    with pytest.raises(ModelError, match=r"the model is itself an nn\.LSTM"):
        quantize(nn.LSTM(SIZE, SIZE))
    model = Last(nn.LSTM(SIZE, SIZE))
    with torch.no_grad():
        model.layer.weight_hh_l0[3, 4] = torch.nan
    with pytest.raises(ModelError, match=r"layer: 1 of 4608"):
        quantize(model)
    assert type(model.layer) is nn.LSTM


def test_a_second_time_leaves_it_alone():
    model = Last(nn.LSTM(SIZE, SIZE))
    quantize(model)
    layer = model.layer
    assert [each.reason for each in quantize(model)] == ["already quantized"] * 2
    assert model.layer is layer
