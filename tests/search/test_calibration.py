"""Codes chosen with data: the outputs of layers have less error on other data, and nothing of the user's changes."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import ExitStack
from functools import partial
from statistics import median

import pytest
import torch
from conv_nets import UNet
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from tinyq_lightning import QuantizationSpec, quantize
from tinyq_lightning.errors import ModelError, SpecError
from tinyq_lightning.layers import QuantizedLayer, kind_of
from tinyq_lightning.plan import Swap
from tinyq_lightning.search import calibration
from tinyq_lightning.search.layer_calls import counted_calls


def digits(count, seed):
    """Blurred strokes: neighbouring pixels are much alike, as in images."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 5, 5, generator=generator)
    return nn.functional.interpolate(coarse, size=16, mode="bilinear") + 0.02 * torch.randn(
        count, 1, 16, 16, generator=generator
    )


class Words(nn.Module):
    """An encoder and a decoder, with a tied head."""

    def __init__(self, size=32, words=40):
        super().__init__()
        self.embed = nn.Embedding(words, size)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(size, 4, 64, dropout=0.1, batch_first=True), 2, enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoderLayer(size, 4, 64, dropout=0.1, batch_first=True)
        self.head = nn.Linear(size, words)

    def forward(self, x):
        hidden = self.embed(x)
        return self.head(self.decoder(hidden, self.encoder(hidden)))


def words(count, seed):
    return torch.randint(40, (count, 12), generator=torch.Generator().manual_seed(seed))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 36, 48),
        nn.ReLU(),
        nn.Linear(48, 10),
    )


class Steps(nn.Module):
    """Reads a series by a GRU and an LSTM, and goes on from there by a cell."""

    def __init__(self):
        super().__init__()
        self.read = nn.GRU(16, 24, batch_first=True, bidirectional=True)
        self.sum_up = nn.LSTM(48, 32, num_layers=2, batch_first=True, dropout=0.1)
        self.step, self.head = nn.GRUCell(4, 32), nn.Linear(32, 4)

    def forward(self, x):
        state = self.sum_up(self.read(x)[0])[0][:, -1]
        said = [x[:, -1, :4]]
        for _ in range(3):
            state = self.step(said[-1], state)
            said.append(self.head(state))
        return torch.stack(said[1:], 1)


def series(count, seed):
    """Sums of a few waves, which all channels have more or less of."""
    generator = torch.Generator().manual_seed(seed)
    times = torch.arange(24.0)[:, None] + 24 * torch.rand(count, 1, 1, generator=generator)
    waves = torch.sin(times / torch.tensor([2.0, 3.0, 5.0, 8.0]))
    mixed = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    return waves @ mixed + 0.05 * torch.randn(count, 24, 16, generator=generator)


CASES = {
    "recurrent": (Steps, series),
    "convolutional": (convolutional, digits),
    "words": (Words, words),
    "unet": (lambda: UNet(8), digits),
}


def made(case):
    torch.manual_seed(0)
    build, data = CASES[case]
    return build().eval(), data


def output_errors(model, method, x, batches=None):
    """By layer, the mean squared error of the outputs on ``x``; calibrated on ``batches``, if there are any."""
    swap, called = Swap(model, QuantizationSpec(method=method)), {}
    if batches is not None:
        swap = swap.recoded(calibration.calibrate(swap, reader(model, batches)))
    with torch.no_grad(), ExitStack() as stack:
        for name, _, layer in swap.called():
            hook = partial(lambda name, _, args: called.setdefault(name, args), name)
            stack.callback(layer.register_forward_pre_hook(hook).remove)
        with swap.opened():
            model(x)
        layers = {name: (module, layer) for name, module, layer in swap.called() if name in called}
        return {
            name: (first(layer.forward(*called[name])) - first(module.forward(*called[name]))).square().mean().item()
            for name, (module, layer) in layers.items()
        }


def first(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs


def reader(model, batches):
    def read(next_batch):
        with torch.no_grad():
            for batch in batches:
                next_batch()
                model(batch)

    return read


@pytest.mark.parametrize("case", CASES)
def test_the_outputs_of_layers_have_less_error_on_data_that_calibration_never_saw(case):
    model, data = made(case)
    without = output_errors(model, "w4a32", data(64, 99))

    with_data = output_errors(model, "w4a32", data(64, 99), [data(32, seed) for seed in range(8)])

    shares = {name: with_data[name] / error for name, error in without.items()}
    assert median(shares.values()) < 0.85
    assert max(shares.values()) < 1.05, shares


@pytest.mark.parametrize("method", ["w4a8", "w4a32"])
@pytest.mark.parametrize("case", CASES)
def test_the_plan_tells_by_how_much_and_why_a_layer_was_left(case, method):
    model, data = made(case)

    plan = quantize(model, method, calibration=[data(32, seed) for seed in range(8)])

    for decision in plan:
        if decision.kind == "embedding":
            assert decision.output_error is None
            assert decision.uncalibrated == "its rows are looked up, not multiplied"
        else:
            assert 0 < decision.output_error <= 1
            assert decision.uncalibrated is None
    assert median(each.output_error for each in plan if each.output_error is not None) < 0.85
    table = plan.table()
    assert "output error" in table
    assert " %" in table
    if case == "words":
        assert "; not calibrated: its rows are looked up, not multiplied" in table


def test_without_data_a_plan_says_nothing_of_it():
    model, _ = made("words")
    plan = quantize(model, "w4a32")
    assert "output error" not in plan.table()
    assert all(not {"output_error", "uncalibrated"} & row.keys() for row in plan.to_list())


def test_cross_attention_is_calibrated_by_what_each_of_its_projections_is_given():
    model, data = made("words")
    batches = [data(32, seed) for seed in range(8)]
    swap = Swap(model, QuantizationSpec(method="w4a32"))
    swap = swap.recoded(calibration.calibrate(swap, reader(model, batches)))
    decisions = {decision.name: decision for decision in swap.plan}
    assert decisions["decoder.multihead_attn.in_proj"].output_error < 0.85

    inputs = []
    model.decoder.multihead_attn.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.extend(args), with_kwargs=True
    )
    with torch.no_grad(), swap.opened():
        model(data(32, 99))
    query, key, _ = inputs
    weight = model.decoder.multihead_attn.in_proj_weight.detach()

    def error(layer):
        change = layer.dequantize() - weight
        parts = zip((query, key, key), change.chunk(3), strict=True)
        return sum((x.flatten(0, 1) @ rows.t()).square().sum().item() for x, rows in parts)

    plain = {name: layer for name, _, layer in Swap(model, QuantizationSpec(method="w4a32")).pairs()}
    chosen = {name: layer for name, _, layer in swap.pairs()}
    name = "decoder.multihead_attn.in_proj"
    assert error(chosen[name]) < 0.85 * error(plain[name])


def test_the_same_data_gives_the_same_bytes_and_other_data_other_codes():
    model, data = made("convolutional")
    batches, others = ([data(16, seed) for seed in seeds] for seeds in (range(4), range(50, 54)))
    states = []
    for given in (batches, DataLoader(TensorDataset(torch.cat(batches)), batch_size=16), others):
        net = copy.deepcopy(model)
        inputs = given if isinstance(given, list) else [x for (x,) in given]
        quantize(net, "w4a32", calibration=inputs)
        states.append(net.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_only_codes_and_biases_differ_from_those_without_data():
    model, data = made("convolutional")
    plain, chosen = copy.deepcopy(model), copy.deepcopy(model)
    quantize(plain, "w4a32")
    quantize(chosen, "w4a32", calibration=[data(32, seed) for seed in range(4)])
    other = chosen.state_dict()
    differ = {name for name, value in plain.state_dict().items() if not torch.equal(value, other[name])}
    assert {name.rpartition(".")[2] for name in differ} == {"int4_weights", "bias"}
    assert "1.bias" not in differ  # of the batch norm


def test_the_model_and_the_data_are_left_as_they_are_and_no_data_is_kept():
    model, data = made("words")
    model.train()
    model.decoder.eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    swap = Swap(model, QuantizationSpec(method="w4a32"))
    batches = [data(8, seed) for seed in range(4)]
    copies = [batch.clone() for batch in batches]
    inner: list[weakref.ref] = []
    model.encoder.register_forward_hook(lambda _, args, out: inner.append(weakref.ref(out)))
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]

    swap = swap.recoded(calibration.calibrate(swap, reader(model, batches)))
    gc.collect()

    assert all(each() is None for each in inner)
    assert all(map(torch.equal, batches, copies))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert not any(isinstance(module, QuantizedLayer) for module in model.modules())
    with swap:
        assert all(torch.equal(each, before[name]) for name, each in model.named_parameters() if "norm" in name)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_layers_that_share_a_weight_have_codes_that_are_good_for_all_of_them():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x).relu())

    torch.manual_seed(0)
    model, mixed = Twice(), torch.randn(24, 24)
    plan = quantize(model, "w4a32", calibration=[torch.randn(64, 24) @ mixed for _ in range(8)])
    assert [decision.tied_to for decision in plan] == [None, "first"]
    assert all(decision.output_error < 0.9 for decision in plan)
    assert model.first.int8_weights is model.second.int8_weights
    assert not torch.equal(model.first.bias, model.second.bias)


@pytest.mark.parametrize("kernel", ["auto", "compact"])
def test_so_have_recurrent_layers_that_share_all_weights(kernel):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.GRU(16, 16, batch_first=True) for _ in range(2))
            self.second.weight_ih_l0, self.second.weight_hh_l0 = self.first.weight_ih_l0, self.first.weight_hh_l0

        def forward(self, x):
            return self.second(self.first(x)[0])[0]

    torch.manual_seed(0)
    model = Twice()
    plain = copy.deepcopy(model)
    quantize(plain, {"method": "w4a32", "kernel": kernel})
    plan = quantize(model, {"method": "w4a32", "kernel": kernel}, calibration=[series(32, seed) for seed in range(4)])
    assert [decision.tied_to for decision in plan] == [None, "first"]
    assert max(decision.output_error for decision in plan) < 0.9
    for name in ("weight_ih_l0", "weight_hh_l0"):
        assert torch.equal(getattr(model.first, name), getattr(model.second, name))
        assert not torch.equal(getattr(model.first, name), getattr(plain.first, name))
    assert not torch.equal(model.first.bias_ih_l0, plain.first.bias_ih_l0)


def test_a_weight_that_is_looked_up_too_keeps_its_codes():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(30, 16), nn.Linear(16, 30)
            self.head.weight, self.body = self.embed.weight, nn.Linear(16, 16)

        def forward(self, x):
            return self.head(self.body(self.embed(x)))

    model = Tied()
    plan = quantize(model, "w4a32", calibration=[torch.randint(30, (8, 4)) for _ in range(4)])
    decisions = {decision.name: decision for decision in plan}
    assert decisions["head"].uncalibrated == "tied to embed: its rows are looked up, not multiplied"
    assert decisions["body"].output_error <= 1


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_layers_whose_weight_a_hook_computes_are_calibrated_and_their_calls_counted():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.utils.weight_norm(nn.Conv2d(4, 16, 3)),
        nn.utils.spectral_norm(nn.Conv2d(16, 16, 3)),
        nn.Flatten(),
        prune.l1_unstructured(nn.Linear(64, 32), "weight", 0.3),
    ).eval()
    mixed, counts = torch.randn(4, 4), {}
    batches = [torch.einsum("bchw,cd->bdhw", torch.randn(64, 4, 6, 6), mixed) for _ in range(8)]
    swap = Swap(model, QuantizationSpec(method="w8a8"))
    with counted_calls(swap, counts):
        model(batches[0])
        swap.put_in()
        model(batches[0])
    swap.take_out()
    assert [sum(calls.values()) for calls in counts.values()] == [2, 2, 2]
    plan = quantize(model, "w4a32", calibration=batches)
    assert all(each.uncalibrated is None and each.output_error < 1 for each in plan)


def test_a_layer_that_the_data_does_not_reach_is_left_and_told():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, both=False):
            return self.used(x) if not both else self.idle(self.used(x))

    model = Half()
    plain = copy.deepcopy(model)
    quantize(plain, "w4a32")
    plan = quantize(model, "w4a32", calibration=[torch.randn(16, 8) for _ in range(4)])
    assert [decision.uncalibrated for decision in plan] == [None, "the data did not reach it"]
    assert torch.equal(model.idle.int8_weights, plain.idle.int8_weights)


def test_layers_whose_moments_do_not_fit_are_watched_one_after_the_other(monkeypatch):
    model, data = made("convolutional")
    batches = [data(16, seed) for seed in range(4)]
    together = copy.deepcopy(model)
    quantize(together, "w4a32", calibration=batches)

    monkeypatch.setattr(calibration, "MOMENTS_BYTES", 1)
    read = []

    class Counted(list):
        def __iter__(self):
            read.append(1)
            return super().__iter__()

    with pytest.raises(ModelError, match="take 5 passes over the data, and an iterator can be read once: give a list"):
        quantize(copy.deepcopy(model), "w4a32", calibration=iter(batches))
    quantize(model, "w4a32", calibration=Counted(batches))

    assert len(read) == 5
    other = together.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in model.state_dict().items())


def test_one_batch_and_an_iterator_are_enough():
    model, data = made("convolutional")
    plan = quantize(model, "w4a32", calibration=iter([data(64, 0)]))
    assert median(decision.output_error for decision in plan) < 0.85


def test_a_spec_tells_how_many_of_the_inputs_to_read():
    seen = []
    model = nn.Sequential(nn.Linear(8, 8))
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    plan = quantize(
        model, {"method": "w4a32", "calibrate": {"batches": 3}}, calibration=(torch.randn(8, 8) for _ in range(9))
    )
    assert len(seen) == 3
    assert plan.to_spec().calibrate.batches == 3


@pytest.mark.parametrize(
    "item", [torch.randn(16, 8), (torch.randn(16, 8),), [torch.randn(16, 8)], {"x": torch.randn(16, 8)}]
)
def test_an_input_is_a_tensor_arguments_or_arguments_by_name(item):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x):
            return self.layer(x)

    (decision,) = quantize(Named(), "w4a32", calibration=[item] * 4)
    assert decision.output_error is not None


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([], "there is no batch: give at least one"),
        (torch.randn(4, 8), r"several inputs, such as a list, not a Tensor: write calibration=\[x\]"),
        (
            [torch.full((4, 8), float("nan"))] * 2,
            "of no use to any layer .its inputs are NaN or infinite.*and its values finite",
        ),
        ([(torch.randn(4, 8), torch.zeros(4))], r"failed on input 0, a tuple \(TypeError: .*without labels"),
        ([torch.randn(4, 3)], "failed on input 0, a Tensor"),
        (3, "several inputs, such as a list, not a int"),
    ],
)
def test_data_that_cannot_be_used_is_refused_and_the_model_stays_float(data, text):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    with pytest.raises(ModelError, match=text):
        quantize(model, "w4a32", calibration=data)
    assert type(model[0]) is nn.Linear


def test_a_layer_whose_inputs_are_not_finite_is_told_by_name_and_has_the_codes_without_data():
    class Logarithms(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.of_logs, self.idle = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            return self.of_logs(self.first(x).log())

    model = Logarithms()
    plain = copy.deepcopy(model)
    quantize(plain, "w4a32")
    with pytest.warns(UserWarning, match=r"without the data: of_logs: its inputs are NaN or infinite[^;]*$") as caught:
        plan = quantize(model, "w4a32", calibration=[torch.randn(16, 8) for _ in range(4)])
    assert caught[0].filename == __file__
    assert plan.decisions[0].output_error is not None
    assert torch.equal(model.of_logs.int8_weights, plain.of_logs.int8_weights)


def test_a_kind_that_names_a_weight_its_layers_do_not_have_is_an_error(monkeypatch):
    kind = type(kind_of(nn.Linear(8, 8)))
    monkeypatch.setattr(kind, "weight_inputs", lambda self, layer, args, kwargs: iter([("other", args[0][None])]))
    with pytest.raises(ModelError, match=r"weight_inputs yields 'other', but the layer has weight: a kind"):
        quantize(nn.Sequential(nn.Linear(8, 8)), "w4a32", calibration=[torch.randn(16, 8)])


def test_data_that_reaches_no_layer_is_refused():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return x

    with pytest.raises(ModelError, match=r"of no use to any layer \(the data did not reach it\)"):
        quantize(Idle(), "w4a32", calibration=[torch.randn(4, 8)])


def test_calibrate_without_data_is_carried_out_without_and_told():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.warns(UserWarning, match=r"calibrate\): there is no data here.*calibration="):
        quantize(model, {"method": "w4a32", "calibrate": 8})
    with pytest.raises(SpecError):
        quantize(
            nn.Sequential(nn.Linear(8, 8)),
            {"method": "w4a32", "calibrate": {"batches": 0}},
            calibration=[torch.randn(4, 8)],
        )


def test_sums_of_several_processes_are_combined():
    model, data = made("words")
    batches = [data(16, seed) for seed in range(4)]
    swap = Swap(model, QuantizationSpec(method="w4a32"))
    combined = []

    def twice(sums):
        combined.append(sums.shape)
        sums += sums.clone()

    alone, doubled = (calibration.calibrate(swap, reader(model, batches), each) for each in (None, twice))

    assert combined
    for name, found in alone.items():
        assert doubled[name].output_error == pytest.approx(found.output_error)
        assert found.codes.keys() == doubled[name].codes.keys()
        for weight, codes in found.codes.items():
            assert torch.equal(codes.int8_weights, doubled[name].codes[weight].int8_weights)


def test_layers_of_eight_bits_have_the_codes_that_they_have_without_data():
    model, data = made("convolutional")
    plain = copy.deepcopy(model)
    spec = {"method": "w4a32", "rules": [{"match": "8", "method": "w8a32"}]}
    quantize(plain, spec)
    plan = quantize(model, spec, calibration=[data(32, seed) for seed in range(4)])
    decisions = {decision.name: decision for decision in plan}
    assert decisions["8"].output_error is decisions["8"].uncalibrated is None
    assert torch.equal(model[8].int8_weights, plain[8].int8_weights)
    assert decisions["10"].output_error < 1


def test_data_for_a_spec_without_four_bits_is_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(SpecError, match="calibration chooses codes of four bits, and no method here has four"):
        quantize(model, "w8a32", calibration=[torch.randn(4, 8)])
    with pytest.raises(SpecError, match="calibrate chooses codes of four bits, and no method here has four"):
        quantize(model, {"method": "w8a32", "calibrate": 8})
