"""A new kind of layer is one class and one entry in the table of kinds."""

from __future__ import annotations

import copy

import pytest
import torch
from models import Net, keeper, loader, trainer
from torch import nn

from tinyq_lightning import TinyQCallback, load_quantized, quantize, quantized
from tinyq_lightning.layers import Int8Weight, kinds, linear_with
from tinyq_lightning.layers.kind import Candidate, Kind
from tinyq_lightning.layers.why_float import why_holds_more, why_weight
from tinyq_lightning.report import summarize


class QuantizedConv1d(Int8Weight):
    """Weight-only: its float weight is rebuilt from the codes on each call."""

    def __init__(self, conv, device="meta"):
        super().__init__(conv.out_channels, conv.weight[0].numel(), conv.weight.dtype, device)
        self.conv = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}
        self.kernel_size = conv.weight.shape[1:]
        self.register_parameter("bias", conv.bias)

    def forward(self, x):
        return nn.functional.conv1d(x, self.weight.unflatten(1, self.kernel_size), self.bias, **self.conv)


class ConvKind(Kind):
    name = "conv"
    takes_methods = False
    quantized_class = QuantizedConv1d

    def finds(self, module):
        return type(module) is nn.Conv1d

    def candidates(self, module, closed):
        matrix = nn.Parameter(module.weight.detach().flatten(1), requires_grad=False)
        layer = linear_with(matrix, module.bias).train(module.training)
        vars(layer)["conv"] = module
        yield Candidate(self, layer, (module, "weight"), closed or why_weight(module) or why_holds_more(module))

    def shape(self, layer):
        return tuple(layer.weight.shape)

    def make(self, layer, codes, method, kernel):
        made = QuantizedConv1d(layer.conv)
        return made.quantize(layer.weight) if codes is None else made.share(codes)

    def make_empty(self, layer, method, kernel):
        return QuantizedConv1d(layer.conv, layer.weight.device)


@pytest.fixture(autouse=True)
def conv_kind(monkeypatch):
    monkeypatch.setattr(kinds, "KINDS", (*kinds.KINDS, ConvKind()))


def convolutions():
    return nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 4, 3, groups=2))


def test_a_model_of_nothing_else_is_quantized_and_a_second_time_left_alone():
    model, x = convolutions(), torch.randn(2, 4, 9)
    wanted = model(x)
    with quantized(model, "w8a32") as plan:
        assert torch.allclose(model(x), wanted, atol=0.02)
    assert [decision.method for decision in plan] == ["w8a32"] * 2
    assert torch.equal(model(x), wanted)
    quantize(model, "w8a32")
    assert [type(layer) for layer in model][::2] == [QuantizedConv1d] * 2
    assert [decision.reason for decision in quantize(model, "w8a32")] == ["already quantized"] * 2
    assert torch.equal(copy.deepcopy(model)(x), model(x))


class WithConv(Net):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)
        self.wide = nn.Conv1d(1, 4, 64, padding=32)

    def forward(self, x):
        return super().forward(self.conv(x[:, None])[:, 0])


def test_a_run_saves_and_loads_it_and_counts_it(tmp_path):
    callback = TinyQCallback("w8a8", monitor="val_acc", max_drop=0.5, report="full")
    run = trainer(tmp_path, keeper(tmp_path), callback)
    module = WithConv()
    run.fit(module, loader(shuffle=True), loader(seed=1))
    assert callback.error is None
    assert callback.plans["w8a8"].decisions[-1].name == "wide"
    assert isinstance(loaded := load_quantized(callback.quantized_path, WithConv), WithConv)
    assert isinstance(loaded.wide, QuantizedConv1d)
    with quantized(module, callback.plan.to_spec()):
        assert summarize(loaded).total_parameters == summarize(module).total_parameters
    run.test(module, loader(), ckpt_path=callback.quantized_path, verbose=False)
    assert type(module.wide) is nn.Conv1d
    assert torch.allclose(module.wide.weight, loaded.wide.weight.unflatten(1, (1, 64)))
