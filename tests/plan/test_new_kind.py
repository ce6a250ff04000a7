"""A new kind of layer is one class and one entry in the table of kinds."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from models import Net, keeper, loader, trainer
from torch import nn

from tinyq_lightning import TinyQCallback, load_quantized, quantize, quantized
from tinyq_lightning.layers import QuantizedLayer, kinds
from tinyq_lightning.layers.int8_weight import Int8Weight
from tinyq_lightning.layers.kind import Candidate, Kind, WeightSize
from tinyq_lightning.layers.why_float import why_holds_more, why_weight
from tinyq_lightning.report import summarize
from tinyq_lightning.search import timing


class QuantizedBilinear(QuantizedLayer):
    """Weight-only, of three dimensions; beside it a matrix for the sum of its inputs, as another weight of its own."""

    def __init__(self, layer, device="meta"):
        super().__init__()
        self.sizes, self.dtype = (layer.out, layer.size), layer.weight.dtype
        self.weight = Int8Weight(layer.out * layer.size, layer.size, self.dtype, device)
        self.direct = Int8Weight(layer.out, layer.size, self.dtype, device)
        self.weight.int8_weights = self.weight.int8_weights.view(layer.out, layer.size, layer.size)
        self.register_parameter("bias", layer.bias)

    def coded_weights(self):
        return {"weight": self.weight, "direct": self.direct}

    def forward(self, x):
        out, size = self.sizes
        weight = (self.weight.int8_weights * self.weight.scales.view(out, size, 1)).to(self.dtype)
        return nn.functional.bilinear(x, x, weight, self.bias) + nn.functional.linear(x, self.direct.weight)


class Form(nn.Module):
    def __init__(self, size, out):
        super().__init__()
        self.size, self.out = size, out
        self.weight = nn.Parameter(torch.randn(out, size, size) / size)
        self.direct = nn.Parameter(torch.randn(out, size) / size)
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x):
        return nn.functional.bilinear(x, x, self.weight, self.bias) + nn.functional.linear(x, self.direct)


class FormKind(Kind):
    name = "recurrent"
    methods = ("w8a32",)
    quantized_class = QuantizedBilinear

    def finds(self, module):
        return type(module) is Form

    def candidates(self, module, closed):
        weights = {name: (module, name) for name in ("weight", "direct")}
        why = closed or why_weight(module) or why_weight(module, "direct")
        yield Candidate(self, module, weights, why or why_holds_more(module, ("weight", "direct", "bias")))

    def sizes(self, layer):
        out, size = layer.sizes if isinstance(layer, QuantizedBilinear) else (layer.out, layer.size)
        return {"weight": WeightSize((out, size, size), out * size), "direct": WeightSize((out, size), out)}

    def make(self, layer, codes, method, kernel):
        made = QuantizedBilinear(layer)
        for name, holder in made.coded_weights().items():
            holder.share(codes[name])
        return made.train(layer.training)

    def make_empty(self, layer, method, kernel):
        return QuantizedBilinear(layer, layer.weight.device)


@pytest.fixture(autouse=True)
def form_kind(monkeypatch):
    monkeypatch.setattr(kinds, "KINDS", (*kinds.KINDS, FormKind()))


def forms():
    return nn.Sequential(Form(8, 6), nn.Tanh(), Form(6, 4))


def test_a_model_of_nothing_else_is_quantized_and_a_second_time_left_alone():
    model, x = forms(), torch.randn(2, 8)
    wanted = model(x)
    with quantized(model, "w8a8") as plan:
        assert torch.allclose(model(x), wanted, atol=0.03)
    assert [(each.method, each.kind, each.reason) for each in plan] == [
        ("w8a32", "recurrent", "spec; its activations stay as they are")
    ] * 2
    assert plan.label == "w8a32", "a plan is not called by what no layer does"
    assert plan.decisions[0].bytes == 6 * 8 * (8 + 4) + 6 * (8 + 4) + 6 * 4
    assert plan.decisions[0].float_bytes == 4 * (6 * 8 * 8 + 6 * 8 + 6)
    assert 40 < plan.decisions[0].weight_sqnr_db < 60
    assert torch.equal(model(x), wanted)
    quantize(model, "w8a32")
    assert [type(layer) for layer in model][::2] == [QuantizedBilinear] * 2
    assert [decision.reason for decision in quantize(model, "w8a32")] == ["already quantized"] * 2
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_the_sqnr_of_several_weights_is_that_of_all_their_values():
    layer = Form(8, 6)
    before = torch.cat([layer.weight.detach().flatten(), layer.direct.detach().flatten()]).double()
    model = nn.Sequential(layer)
    plan = quantize(model)
    codes = model[0].coded_weights()
    scales = codes["weight"].scales.view(6, 8, 1)
    after = torch.cat([(codes["weight"].int8_weights * scales).flatten(), codes["direct"].weight.flatten()])
    wanted = 10 * torch.log10(before.square().sum() / (after - before).square().sum())
    assert plan.decisions[0].weight_sqnr_db == pytest.approx(float(wanted), abs=0.01)


class WithForm(Net):
    def __init__(self):
        super().__init__()
        self.form = Form(8, 8)

    def forward(self, x):
        return super().forward(self.form(x))


def test_a_run_saves_and_loads_it_and_counts_it(tmp_path):
    callback = TinyQCallback("w8a8", monitor="val_acc", max_drop=0.5, report="full")
    run = trainer(tmp_path, keeper(tmp_path), callback)
    module = WithForm()
    run.fit(module, loader(shuffle=True), loader(seed=1))
    assert callback.error is None
    assert callback.plans["w8a8"].decisions[-1].name == "form"
    loaded = load_quantized(callback.quantized_path, WithForm)
    assert isinstance(loaded.form, QuantizedBilinear)
    with quantized(module, callback.plan.to_spec()):
        assert summarize(loaded).total_parameters == summarize(module).total_parameters
        assert all(torch.equal(a, b) for a, b in zip(module.buffers(), loaded.buffers(), strict=True))
    run.test(module, loader(), ckpt_path=callback.quantized_path, verbose=False)
    assert type(module.form) is Form
    codes = loaded.form.coded_weights()["weight"]
    assert torch.equal(module.form.weight, codes.int8_weights * codes.scales.view(8, 8, 1))


@pytest.mark.parametrize("slower", [False, True])
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.filterwarnings("ignore:TinyQ. w8a8. budget NOT met")
def test_budget_full_report_and_never_slower_reach_it(tmp_path, monkeypatch, mode, slower):
    real, called = timing.time_call, []

    def time_call(layers, call):
        real(layers, call)
        called.append((type(layers[0][0]), call.sizes))
        return timing.Timing(1.0, 2.0 if slower and isinstance(layers[0][0], Form) else 1.0)

    monkeypatch.setattr(timing, "time_call", time_call)
    callback = TinyQCallback("w8a8", monitor="val_loss", mode=mode, max_drop=0.0, report="full", never_slower=True)
    run = trainer(tmp_path, keeper(tmp_path), callback)
    run.fit(WithForm(), loader(shuffle=True), loader(seed=1))
    assert callback.error is None
    assert (Form, (32, 8)) in called
    told = json.loads(next(tmp_path.rglob("*.json")).read_text())
    form = next(layer for layer in told["layers"] if layer["name"] == "form")
    assert form["kind"] == "recurrent"
    assert {each["kind"] for each in told["never_slower"]["timings"]} == {"linear", "recurrent"}
    assert (form["decided_by"] == "timing") == slower
    if not slower:
        assert set(form["output_sqnr_db"]) == {"w8a32"}
        assert 20 < form["output_sqnr_db"]["w8a32"] < 60
