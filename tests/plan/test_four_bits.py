"""Plans of four bits: which bits each layer has and why, ties, bytes, and a swap that gives layers eight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tinyq_lightning import Quantizer, W4A8LinearLayer, W4A16LinearLayer, W4A32LinearLayer, quantize
from tinyq_lightning.errors import SpecError
from tinyq_lightning.kernels.four_bits import quantize_groups
from tinyq_lightning.layers import KINDS, Int8Weight
from tinyq_lightning.plan.plan import state_bytes
from tinyq_lightning.plan.resolution import resolve
from tinyq_lightning.plan.swap import Swap
from tinyq_lightning.spec.spec import as_spec

METHODS = ("w4a32", "w4a16", "w4a8")


class Tied(nn.Module):
    """An embedding whose weight the head shares, and layers of the other kinds."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 48), nn.Linear(48, 50)
        self.head.weight = self.embed.weight
        self.attention = nn.MultiheadAttention(48, 4, batch_first=True)
        self.conv, self.depthwise = nn.Conv1d(48, 24, 3, padding=1), nn.Conv1d(24, 24, 5, groups=24, padding=2)
        self.up = nn.ConvTranspose1d(24, 48, 4, stride=2, padding=1)
        self.lstm, self.cell = nn.LSTM(48, 24, batch_first=True, bidirectional=True), nn.GRUCell(48, 33)
        self.bag, self.last = nn.EmbeddingBag(50, 48), nn.Linear(33, 48)

    def forward(self, tokens):
        x = self.embed(tokens) + self.bag(tokens)[:, None]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.up(self.depthwise(self.conv(x.transpose(1, 2)).relu())).transpose(1, 2)
        x = self.lstm(x)[0]
        return self.head(x + self.last(self.cell(x[:, 0]))[:, None])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tied().eval()


@pytest.fixture
def tokens():
    return torch.randint(50, (3, 10), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kernel", ["auto", "compact", "int8", "reference"])
@pytest.mark.parametrize("method", METHODS)
def test_layers_of_every_kind_run_in_four_bits_and_load_again(model, tokens, method, kernel):
    before, other = model(tokens), copy.deepcopy(model)
    plan = quantize(model, {"method": method, "kernel": kernel})
    assert all(decision.method in ("w4a32", method) for decision in plan)
    assert {decision.kind for decision in plan} == {kind.name for kind in KINDS} - {"matrix"}
    with torch.no_grad():
        out = model(tokens)
    assert (out - before).norm() < 0.3 * before.norm()
    assert (out - before).norm() > 0
    quantize(other, {"method": method, "kernel": kernel})
    for buffer in other.buffers():
        buffer.zero_() if buffer.dtype == torch.float32 else None
    state = model.state_dict()
    assert state["embed.int4_weights"] is state["head.int4_weights"]
    other.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(other(tokens), out)
        assert torch.equal(copy.deepcopy(model)(tokens), out)


@pytest.mark.parametrize("method", METHODS)
def test_layers_have_the_bits_of_eight_bit_layers_with_the_expanded_codes(model, tokens, method):
    eight = copy.deepcopy(model)
    quantize(model, {"method": method})
    quantize(eight, {"method": method.replace("w4", "w8")})
    for ours, theirs in zip(model.modules(), eight.modules(), strict=True):
        if isinstance(ours, Int8Weight):
            theirs.take_codes(ours.int8_weights, ours.scales)
        elif hasattr(ours, "codes_of"):
            theirs.take_codes({name: (*ours.codes_of(name), None) for name in ours.weight_names})
    with torch.no_grad():
        assert torch.equal(model(tokens), eight(tokens))


def operators(model, *inputs):
    """What a call computes: names of operators with the shapes of what they are given, in their order."""
    with torch.no_grad():
        model(*inputs)  # forms are made
        with torch.profiler.profile(record_shapes=True) as profile:
            model(*inputs)
    return [(event.name, str(event.input_shapes)) for event in profile.events()]


@pytest.mark.parametrize("method", METHODS)
def test_a_call_runs_the_operators_of_eight_bits(model, method):
    eight = copy.deepcopy(model)
    plans, others = quantize(model, method), quantize(eight, method.replace("w4", "w8"))
    assert [each.kernel for each in plans] == [each.kernel for each in others]
    for rows in (1, 40):
        tokens = torch.randint(50, (rows, 10), generator=torch.Generator().manual_seed(0))
        assert operators(model, tokens) == operators(eight, tokens)


def test_the_plan_counts_the_bytes_of_the_state(model):
    plan = quantize(model, "w4a32")
    assert sum(decision.bytes for decision in plan) == state_bytes(model.state_dict())
    assert plan.label == "w4a32"
    assert "of the weight bytes in int4 (w4a32)" in str(plan)


@pytest.mark.parametrize("method", METHODS)
def test_with_kernel_compact_the_codes_stay_packed(model, tokens, method):
    plan = quantize(model, {"method": method, "kernel": "compact", "kinds": ["linear", "conv", "embedding"]})
    with torch.no_grad():
        model(tokens)
    layers = [layer for layer in model.modules() if isinstance(layer, Int8Weight)]
    assert {layer.choice.kernel for layer in layers} == {"int4"}
    assert all("int8_weights" not in dict(layer.named_buffers()) for layer in layers)
    held = sum(decision.memory_bytes for decision in plan if decision.kernel)
    assert held <= 1.1 * sum(decision.bytes for decision in plan if decision.kernel)
    packed = model.last.int4_weights
    assert model.last.state_dict()["int4_weights"] is packed


def test_a_layer_that_four_bits_make_no_smaller_keeps_eight_or_stays_float():
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(1, 8))
    plan = resolve(as_spec("w4a8"), model)
    assert [decision.method for decision in plan] == ["w8a8", "w4a8", "float"]
    assert plan.decisions[0].reason == "spec; four bits are no smaller than eight"
    assert plan.decisions[2].reason == "int8 is no smaller: 1 + 4 bytes a row, 4 as float"
    assert plan.label == "w4a8"
    half = resolve(as_spec("w4a32"), nn.Sequential(nn.Linear(4, 8)).half())
    assert half.decisions[0].method == "w4a32"  # 2 + 1 + 4 bytes a row, where floats take 8 and int8 does, too


def test_layers_that_share_a_weight_have_the_bits_of_the_one_with_more(model):
    for match, other in (("embed", "head"), ("head", "embed")):
        rules = [{"match": match, "method": "w8a32"}, {"match": other, "method": "w4a8"}]
        spec = as_spec({"method": "w4a8", "rules": rules})
        found = {decision.name: decision for decision in resolve(spec, model)}
        assert (found["embed"].method, found["head"].method) == ("w8a32", "w8a32" if match == "head" else "w8a8")
        assert found[other].reason.startswith(f"tied to {match}.weight (rule 1)")
    quantize(model, spec)
    assert model.embed.int8_weights is model.head.int8_weights


def test_a_swap_gives_layers_eight_bits_and_those_that_share_their_weight_with_them(model, tokens):
    swap = Swap(model, as_spec("w4a8"))
    raised = swap.switched({"head": ("w8a8", "budget: because"), "last": ("float", "budget: so")}, "budget")
    found = {decision.name: decision for decision in raised.plan}
    assert (found["head"].method, found["embed"].method, found["last"].method) == ("w8a8", "w8a32", "float")
    assert found["embed"].reason == "tied to head.weight; a look-up has no activations"
    assert found["embed"].weight_sqnr_db == found["head"].weight_sqnr_db > 40
    with raised:
        assert model.embed.int8_weights is model.head.int8_weights
        assert sum(decision.bytes for decision in raised.plan) == state_bytes(model.state_dict())
        out = model(tokens)
    spec = raised.plan.to_spec()
    with Swap(model, spec) as again:
        assert torch.equal(model(tokens), out)
    assert again.plan.decisions == raised.plan.decisions
    assert swap.bytes_by("head", "w8a32") == found["head"].bytes


def test_the_tutorials_engine_takes_the_methods():
    for method, target in zip(METHODS, (W4A32LinearLayer, W4A16LinearLayer, W4A8LinearLayer), strict=True):
        linear = nn.Linear(64, 8)
        quantizer = Quantizer(nn.Sequential(linear))
        layer = quantizer.quantize(method)[0]
        assert type(layer) is target
        packed, multipliers, scales = quantize_groups(linear.weight)
        assert torch.equal(layer.int4_weights, packed)
        assert torch.equal(layer.multipliers, multipliers)
        assert torch.equal(layer.scales, scales)
        assert (layer.weight - linear.weight).norm() < 0.15 * linear.weight.norm()


def test_a_name_that_is_nearly_a_method_gets_the_nearest():
    with pytest.raises(SpecError, match="Did you mean 'w4a32'"):
        as_spec("w4a3")


def test_matrices_of_four_bits_stay_packed_and_are_read_as_floats():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 16, 33))

    for kernel in ("auto", "compact"):
        module = nn.ModuleDict({"experts": Experts()})
        before = module["experts"].up.detach().clone()
        quantize(module, {"method": "w4a8", "kernel": kernel, "rules": [{"match": "experts.up", "method": "w4a8"}]})
        read = module["experts"].up
        assert (read - before).norm() < 0.15 * before.norm()
        names = {name for name, _ in module.named_buffers()}
        assert any("int8_weights" in name for name in names) == (kernel == "auto")
        assert module.state_dict()["experts.up.int4_weights"].shape == (48, 17)


def test_eight_bit_codes_are_refused_by_a_layer_of_four(model):
    other = copy.deepcopy(model)
    quantize(model, "w4a32")
    quantize(other, "w8a32")
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*head\.int4_weights.*Unexpected.*head\.int8_weights"):
        model.load_state_dict(other.state_dict())
