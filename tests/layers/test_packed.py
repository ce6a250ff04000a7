"""What a layer holds once a kernel has packed its weights."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from kernel_cases import LARGE, each_method, holds_plain_codes, normal, random_layer, relative_error, with_products
from torch import nn

from tinyq_lightning import quantize
from tinyq_lightning.kernels.choice import FORMS
from tinyq_lightning.kernels.integer import has_plain_product
from tinyq_lightning.kernels.weights import dequantize
from tinyq_lightning.layers.linear import LAYERS, QuantizedLinear
from tinyq_lightning.methods import METHODS


def packed_layer(method="w8a16"):
    layer = random_layer(method, *LARGE)
    return layer, layer.int8_weights.clone(), normal(3, LARGE[1])


BESIDE_CODES = [name for name, form in FORMS.items() if not form.holds_codes]


@each_method
def test_once_packed_the_codes_are_held_in_one_form_only(kernel, method):
    layer, codes, x = packed_layer(method)
    plain = weakref.ref(layer.int8_weights)
    layer(x)
    gc.collect()
    assert holds_plain_codes(layer) == (layer.choice.kernel in BESIDE_CODES)
    if layer.choice.kernel not in BESIDE_CODES:
        assert plain() is None
    assert torch.equal(layer.int8_weights, codes)


@each_method
def test_reading_the_codes_gives_them_back_and_changes_no_bit(kernel, method):
    layer, codes, x = packed_layer(method)
    out = layer(x)
    assert torch.equal(layer.dequantize(), dequantize(codes, layer.scales))
    assert torch.equal(layer.weight, layer.dequantize())
    assert torch.equal(layer(x), out)


@each_method
def test_state_dict_of_a_packed_layer_is_plain_and_leaves_it_packed(kernel, method):
    layer, codes, x = packed_layer(method)
    names = list(layer.state_dict())
    layer(x)
    state = layer.state_dict()
    assert list(state) == names
    assert torch.equal(state["int8_weights"], codes)
    assert state["int8_weights"].is_contiguous()
    assert holds_plain_codes(layer) == (layer.choice.kernel in BESIDE_CODES)


@pytest.mark.parametrize("assign", [True, False])
@each_method
def test_a_state_dict_loads_into_a_packed_layer(kernel, assign, method):
    layer, _, x = packed_layer(method)
    other = random_layer(method, *LARGE, seed=9)
    layer(x)
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(layer(x), other(x))


def test_quantizing_anew_writing_and_setting_codes_are_seen(kernel):
    layer, codes, x = packed_layer()
    out = layer(x)
    layer.int8_weights.zero_()
    assert torch.equal(layer(x), layer.bias.expand(3, -1))
    layer.int8_weights = codes
    assert torch.equal(layer(x), out)
    layer.scales.mul_(2)
    torch.testing.assert_close(layer(x) - layer.bias, 2 * (out - layer.bias), rtol=1e-3, atol=1e-4)
    layer.quantize(torch.zeros(LARGE))
    assert torch.equal(layer(x), layer.bias.expand(3, -1))


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_of_a_packed_layer_have_the_same_bits_and_are_apart(kernel, copied):
    layer, codes, x = packed_layer()
    out = layer(x)
    other = copied(layer)
    assert torch.equal(other(x), out)
    other.int8_weights = torch.zeros_like(codes)
    assert torch.equal(layer(x), out)
    assert torch.equal(layer.int8_weights, codes)


def test_casts_leave_the_weights_packed_and_moves_take_them_along(kernel):
    layer, _, x = packed_layer()
    layer(x)
    layer.bfloat16()
    assert holds_plain_codes(layer) == (layer.choice.kernel in BESIDE_CODES)
    assert layer.dtype == torch.bfloat16
    assert layer.to("meta").int8_weights.is_meta


def test_codes_that_layers_share_are_packed_once_and_stay_shared(kernel):
    first, codes, x = packed_layer()
    second = LAYERS["w8a16"](LARGE[1], LARGE[0]).share(first)
    second.bias = first.bias
    assert torch.equal(first(x), second(x))
    taken = first.choice.kernel
    assert first._forms[taken] is second._forms[taken]
    state = nn.ModuleList([first, second]).state_dict()
    assert state["0.int8_weights"].data_ptr() == state["1.int8_weights"].data_ptr()
    assert torch.equal(state["0.int8_weights"], codes)
    both = copy.deepcopy(nn.ModuleList([first, second]))
    assert both[0].int8_weights is both[1].int8_weights


def test_other_methods_of_a_layer_use_the_same_packed_weights(kernel):
    layer, codes, x = packed_layer("w8a32")
    layer(x)
    other = layer.with_method("w8a8")
    alone = random_layer("w8a8", *LARGE)
    assert torch.equal(other(x), alone(x))
    assert other._forms is layer._forms
    assert torch.equal(layer.int8_weights, codes)


def test_weights_of_somebody_else_can_stand_in_for_a_while(kernel):
    layer, _, x = packed_layer()
    out = layer(x)
    others = random_layer("w8a16", *LARGE, seed=9)
    state = dict(others.state_dict())
    borrowed = torch.func.functional_call(layer, state, (x,))
    torch.testing.assert_close(borrowed, others(x), rtol=1e-3, atol=2e-3)  # by the formula
    torch.testing.assert_close(layer(x), out, rtol=1e-4, atol=1e-4)


def test_scales_that_are_written_to_count_in_the_next_call(kernel):
    for method in METHODS:
        layer = random_layer(method, *LARGE, bias=False)
        x = normal(3, LARGE[1])
        out = layer(x)
        with torch.no_grad():
            layer.scales.mul_(2)
        assert torch.equal(layer(x), 2 * out)
        layer.scales = layer.scales / 2
        assert torch.equal(layer(x), out)


def test_codes_that_are_written_to_count_for_few_rows_and_for_many(monkeypatch):
    with_products(monkeypatch, has_plain=True)
    layer = random_layer("w8a32", 300, 400, bias=False)
    few, many = normal(layer.choice.few_rows - 1, 400), normal(layer.choice.few_rows, 400)
    for x in (few, many, few):
        layer(x)
    assert set(layer._forms) == {"int8", "float32"}
    codes = layer.int8_weights
    layer(many)
    codes.zero_()
    assert not layer(few).any()
    assert not layer(many).any()


def test_attention_runs_packed_for_itself_and_across(kernel):
    attention = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    float_attention = copy.deepcopy(attention)
    model = nn.ModuleList([attention])
    quantize(model, "w8a32")
    x, memory = normal(2, 5, 64), normal(2, 7, 64, seed=2)
    with torch.no_grad():
        for arguments in ((x, x, x), (x, memory, memory), (x, memory, memory * 2)):
            wanted, _ = float_attention(*arguments)
            if kernel.startswith("int8") and not has_plain_product():
                break  # codes of ±127 would saturate here
            got, _ = model[0](*arguments)
            assert relative_error(got, wanted.double()) < 0.02
    layers = [each for each in model.modules() if isinstance(each, QuantizedLinear)]
    assert len(layers) == 2
