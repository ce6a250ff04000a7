"""Quantized layers in code that was written for nn.Linear, and in threads."""

import threading

import numpy as np
import pytest
import torch
from kernel_cases import each_method, normal, random_layer
from torch import nn

from tinyq_lightning import quantize
from tinyq_lightning.errors import ReadOnlyWeightError
from tinyq_lightning.layers import dequantized
from tinyq_lightning.layers.linear import QuantizedLinear


class AsksForLinear(nn.Module):
    """Treats linear layers in a way of its own, as many packages do."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(10 + 2, 32), nn.ReLU(), nn.Linear(32 + 2, 8)])

    def forward(self, x, more):
        for layer in self.layers:
            x = layer(torch.cat([x, more], -1)) if isinstance(layer, nn.Linear) else layer(x)
        return x


@each_method
def test_code_that_asks_for_linear_layers_finds_quantized_ones(method):
    model, x, more = AsksForLinear(), normal(4, 10), normal(4, 2)
    wanted = model(x, more)
    names = {"layers.0.bias", "layers.2.bias"}
    quantize(model, method)
    assert (model(x, more) - wanted).norm() < 0.05 * wanted.norm()
    assert {name for name, _ in model.named_parameters()} == names
    assert set(model.state_dict()) == names | {f"layers.{i}.{n}" for i in (0, 2) for n in ("int8_weights", "scales")}


def test_quantizing_again_leaves_quantized_layers_as_they_are():
    model = AsksForLinear()
    quantize(model, {"method": "w8a32", "exclude": ["layers.2"]})
    first = model.layers[0]
    plan = quantize(model, "w8a8")
    assert model.layers[0] is first
    assert [decision.method for decision in plan] == ["w8a32", "w8a8"]


def test_initializing_a_quantized_layer_is_refused_in_words():
    layer = random_layer("w8a32", 4, 6)
    with pytest.raises(ReadOnlyWeightError, match=r"\.quantize\(weight\)"):
        layer.reset_parameters()


class LowRank(nn.Module):
    """An adapter on a linear layer."""

    def __init__(self, base):
        super().__init__()
        assert isinstance(base, nn.Linear)
        weight = base.weight
        self.base = base
        self.down = nn.Linear(base.in_features, 4, bias=False, device=weight.device, dtype=weight.dtype)
        self.up = nn.Linear(4, base.out_features, bias=False, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@each_method
def test_an_adapter_on_an_int8_base_trains_and_saves(method, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    quantize(model, method)
    adapted = nn.Sequential(LowRank(model[0]), nn.ReLU(), LowRank(model[2]))
    codes = model[0].int8_weights.clone()
    trained = [p for name, p in adapted.named_parameters() if "base" not in name]
    optimizer = torch.optim.SGD(trained, 0.1)
    x, y = normal(64, 16), normal(64, 4, seed=2)
    losses = []
    for _ in range(20):
        loss = nn.functional.mse_loss(adapted(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(model[0].int8_weights, codes)
    torch.save(adapted.state_dict(), tmp_path / "adapted.pt")
    out = adapted(x)
    with torch.no_grad():
        for each in trained:
            each.zero_()
    adapted.load_state_dict(torch.load(tmp_path / "adapted.pt"))
    assert torch.equal(adapted(x), out)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d])
def test_the_class_of_a_convolution_makes_float_adapters(kind):
    base = nn.Sequential(kind(4, 6, 3, padding=1))
    quantize(base)
    down = type(base[0])(base[0].in_channels, 2, base[0].kernel_size, padding=1, bias=False)  # as PEFT has it
    up = type(base[0])(in_channels=np.int64(2), out_channels=6, kernel_size=1, bias=False)
    assert type(down) is type(up) is kind
    x = normal(2, 4, *[5] * (down.weight.dim() - 2))
    (base(x) + up(down(x))).square().sum().backward()
    assert down.weight.grad.abs().sum() > 0


def test_training_a_layer_of_codes_is_told_to_be_of_its_bias_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.LSTM(4, 4), nn.Embedding(4, 4))
    quantize(model)
    model.requires_grad_(False).requires_grad_()
    for layer in model:
        with pytest.warns(UserWarning, match="codes, which cannot be trained.*exclude"):
            assert layer.requires_grad_() is layer


def test_taking_a_weight_out_of_attention_is_refused_in_words():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    quantize(model)
    with pytest.raises(ReadOnlyWeightError, match="exclude"):
        del model[0].in_proj_weight


def test_reading_what_a_weight_is_dequantizes_nothing(monkeypatch):
    layer, count = random_layer("w8a32", 60, 50), [0]
    real = dequantized.dequantize

    def counting(*args, **kwargs):
        count[0] += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(dequantized, "dequantize", counting)
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device) == ((60, 50), torch.float32, torch.device("cpu"))
    assert (weight.dim(), weight.numel(), weight.requires_grad, weight.is_contiguous()) == (2, 3000, False, True)
    assert count == [0]
    x = normal(3, 50)
    for _ in range(3):
        nn.functional.linear(x, layer.weight)
    assert count == [1]


@each_method
def test_the_values_of_a_weight_follow_what_is_written_to_the_layer(kernel, method):
    layer = random_layer(method, 60, 50)
    x = normal(300, 50)
    for _ in range(2):
        assert torch.equal(layer.weight * 1, layer.dequantize())
        layer(x)  # packs the codes
    with torch.no_grad():
        layer.scales.mul_(2)
        assert torch.equal(layer.weight * 1, layer.dequantize())
        layer.int8_weights.zero_()
        assert not (layer.weight * 1).any()
    layer.quantize(normal(60, 50))
    assert torch.equal(layer.weight * 1, layer.dequantize())
    assert layer.bfloat16().weight.dtype == torch.bfloat16
    assert (layer.weight * 1).dtype == torch.bfloat16


def test_a_weight_that_an_operator_would_write_to_is_refused():
    layer = random_layer("w8a32", 4, 6)
    with pytest.raises(ReadOnlyWeightError):
        torch.add(torch.ones(4, 6), 1, out=layer.weight)
    with pytest.raises(ReadOnlyWeightError):
        torch._foreach_mul_([layer.weight], 2.0)


@each_method
def test_threads_may_make_the_first_call_at_the_same_time(kernel, method):
    for _ in range(10):
        model = nn.Sequential(*(random_layer(method, 300, 300, seed=seed) for seed in range(3)))
        wanted = [layer.int8_weights.clone() for layer in model]
        x, barrier, outs, failures = normal(8, 300), threading.Barrier(4), [], []

        def run(model=model, x=x, barrier=barrier, outs=outs, failures=failures):
            torch.set_num_threads(1)  # else MKL gives some of the threads two, and adds in another order there
            barrier.wait()
            try:
                with torch.no_grad():
                    for _ in range(3):
                        outs.append(model(x))
                        model.state_dict()
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert all(torch.equal(out, outs[0]) for out in outs)
        for layer, codes in zip(model, wanted, strict=True):
            assert isinstance(layer, QuantizedLinear)
            assert torch.equal(layer.int8_weights, codes)


def test_a_layer_that_is_traced_alone_says_what_to_do():
    model = nn.Sequential(nn.Linear(16, 8))
    quantize(model)
    with pytest.raises(TypeError, match=r"torch.fx takes a W8A32LinearLayer for one call.*put it in an nn.Sequential"):
        torch.fx.symbolic_trace(model[0])
