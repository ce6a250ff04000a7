"""Convolutions in the plan: what is quantized, what stays float and why, and what is predicted of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from tinyq_lightning import W8A8LinearLayer, quantize, quantized
from tinyq_lightning.errors import ModelError
from tinyq_lightning.kernels.weights import predicted_sqnr_db
from tinyq_lightning.layers.conv import QuantizedConv


class Activated(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight, self.bias).relu()


class Turned(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input.flip(-1), weight, bias)


class Named(nn.Conv2d):
    """Adds nothing."""

    def reset_parameters(self):
        nn.init.normal_(self.weight)


def test_what_is_more_than_a_convolution_stays_float_with_the_reason():
    model = nn.Sequential(Activated(4, 8, 3), Turned(8, 8, 3), Named(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    model[3].register_buffer("mask", torch.ones(8, 8, 3, 3))
    reasons = [decision.reason for decision in quantize(model, "w8a32")]
    assert "forward of its own" in reasons[0]
    assert "_conv_forward" in reasons[1]
    assert "mask" in reasons[3]
    assert [isinstance(layer, QuantizedConv) for layer in model] == [False, False, True, False, True]


def test_transposed_convolutions_take_activations_as_they_are_and_the_plan_says_so():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 4, 3))
    first, second = quantize(model, "w8a8")
    assert (first.method, first.kind) == ("w8a8", "conv")
    assert (second.method, second.kind) == ("w8a32", "conv")
    assert "transposed convolution takes activations as they are" in second.reason
    assert first.kernel is not None
    assert second.kernel is not None


def test_lazy_convolutions_are_quantized_once_they_have_a_weight():
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyConvTranspose2d(4, 3))
    with pytest.raises(ModelError, match=r"0: .*run one batch"):
        quantize(model, "w8a32")
    x = torch.randn(2, 5, 9, 9)
    wanted = model(x)
    quantize(model, "w8a32")
    assert all(isinstance(layer, QuantizedConv) for layer in model)
    assert torch.allclose(model(x), wanted, atol=0.05)


def test_parametrized_convolutions_are_quantized_with_the_weight_that_they_use():
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv1d(4, 8, 3)), nn.Conv1d(8, 4, 3)).eval()
    x = torch.randn(2, 4, 12)
    wanted = model(x)
    with quantized(model, "w8a32"):
        assert torch.allclose(model(x), wanted, atol=0.05)
    assert torch.equal(model(x), wanted)


def test_parametrizations_that_count_their_calls_in_training_are_left_as_they_are():
    kinds = nn.Conv1d(4, 8, 3), nn.ConvTranspose1d(4, 8, 3), nn.Linear(8, 8), nn.Embedding(6, 8), nn.EmbeddingBag(6, 8)
    model = nn.Sequential(*(parametrizations.spectral_norm(each) for each in kinds)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for method in ("w8a32", "w8a8"):
        with quantized(model, method) as plan:
            assert all(each.method != "float" for each in plan)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_convolution_that_is_used_twice_is_quantized_once():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    plan = quantize(model, "w8a8")
    assert model[0] is model[2]
    assert [decision.name for decision in plan] == ["0"]
    assert plan.decisions[0].aliases == ("2",)


def test_the_tutorials_functions_are_about_linear_layers_alone():
    from tinyq_lightning import replace_linear_with_target_and_quantize

    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 4))
    replace_linear_with_target_and_quantize(model, W8A8LinearLayer, [])
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize(
    "conv", [nn.Conv1d(32, 64, 5), nn.Conv2d(32, 64, 3), nn.Conv3d(8, 64, 3), nn.ConvTranspose2d(64, 32, 3, groups=2)]
)
def test_the_sqnr_of_the_weight_is_as_predicted(conv):
    model = nn.Sequential(conv)
    weight = conv.weight.detach()
    if conv.transposed:
        weight = weight.unflatten(0, (conv.groups, -1)).transpose(1, 2)
    rows = weight.reshape(conv.out_channels, -1)
    (decision,) = quantize(model, "w8a32")
    assert decision.weight_sqnr_db == pytest.approx(predicted_sqnr_db(rows), abs=0.3)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_w8a8_costs_what_rounding_each_sample_is_predicted_to_cost(scale):
    """White noise: the noise of activations is step²/12 a value, over the power of the sample."""
    conv = nn.Conv2d(64, 32, 3, bias=False)
    x = torch.randn(4, 64, 20, 20, generator=torch.Generator().manual_seed(0))
    x[1] *= scale
    with torch.no_grad():
        model = nn.Sequential(conv)
        quantize(model, "w8a32")
        exact = model(x).double()
        model[0] = model[0].with_method("w8a8")
        noise = model(x).double() - exact
    for sample in range(4):
        step = x[sample].abs().max() / 127
        predicted = 10 * math.log10(x[sample].square().mean() / (step**2 / 12))
        measured = 10 * math.log10(exact[sample].square().sum() / noise[sample].square().sum())
        assert measured == pytest.approx(predicted, abs=0.5)
