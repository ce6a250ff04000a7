"""How exact each kernel is, for usual and unusual inputs."""

import math

import pytest
import torch
from kernel_cases import (
    LARGE,
    by_formula,
    each_method,
    exact,
    int8_only,
    median_errors_of_w8a32,
    normal,
    random_layer,
    relative_error,
    with_products,
)
from torch import nn

from tinyq_lightning.kernels.float16 import has_float16_product
from tinyq_lightning.kernels.weights import activation_steps, dequantize

SHAPES = [(64, 64), (1, 37), (5, 1), (130, 96), (200, 1000), LARGE]


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 33])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_w8a32_is_as_exact_as_a_float_product(kernel, shape, rows):
    layer = random_layer("w8a32", *shape)
    x = normal(rows, shape[1])
    expected = exact(layer, x)
    linear = relative_error(nn.functional.linear(x, layer.dequantize(), layer.bias), expected)
    assert relative_error(layer(x), expected) <= linear + (2e-7 if kernel.startswith("int8") else 1e-7)


@int8_only
def test_w8a32_by_int8_has_a_smaller_error_than_float32_in_the_median(kernel):
    shapes = [(64, 64), (96, 384), (384, 96), (130, 700), (300, 1024), (64, 4096)]
    mine, linear = median_errors_of_w8a32(shapes, (1, 4, 16, 64))
    assert mine <= linear


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_w8a16_errs_by_a_ten_thousandth_at_most(kernel, shape):
    layer = random_layer("w8a16", *shape)
    x = normal(16, shape[1])
    assert relative_error(layer(x), exact(layer, x)) <= 1e-4


@pytest.mark.parametrize("shape", [(200, 1000), LARGE, (64, 4096)], ids=str)
def test_w8a8_errs_as_rounding_to_one_step_of_each_row_predicts(kernel, shape):
    layer = random_layer("w8a8", *shape, bias=False)
    x = normal(64, shape[1])
    expected = exact(layer, x)
    noise = (layer(x).double() - expected).square().sum()
    weight = dequantize(layer.int8_weights, layer.scales, torch.float64)
    # uniform rounding noise of step²/12 in each activation, independent of the weights
    predicted = (activation_steps(x.double(), 127).square() / 12 * weight.square().sum()).sum()
    assert abs(10 * math.log10(noise / predicted)) < 0.5


@each_method
def test_kernels_agree_with_the_formula(kernel, method):
    layer = random_layer(method, *LARGE)
    x = normal(9, LARGE[1])
    got = layer(x)
    layer.kernel = "reference"
    wanted = by_formula(layer, x)
    assert relative_error(got, wanted.double()) < {"w8a32": 2e-6, "w8a16": 1e-4, "w8a8": 2e-3}[method]


@pytest.mark.parametrize("mean", [0, 1])  # of both signs, and where sums grow as fast as they can
@pytest.mark.parametrize("products", [{"has_float16": True}, {}], ids=["float16", "neither"])
def test_w8a32_is_in_the_median_no_less_exact_than_float32(products, mean, monkeypatch):
    if products and not has_float16_product():
        pytest.skip("no float16 product on this processor")
    with_products(monkeypatch, **products)
    shapes = [(64, 64), (600, 700), (300, 1024), (1100, 1000), (300, 2100), (256, 4096)]
    mine, linear = median_errors_of_w8a32(shapes, (1, 2, 5, 16, 17, 64), mean)
    assert mine <= 1.05 * linear


@each_method
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_row_is_non_finite_and_leaves_the_others_alone(kernel, method, bad):
    layer = random_layer(method, 30, 24)
    layer.int8_weights = layer.int8_weights.abs().clamp_min(1)
    x = normal(5, 24)
    clean = layer(x)
    x[2, 7] = bad
    out = layer(x)
    assert not torch.isfinite(out[2]).any()
    others = [0, 1, 3, 4]
    assert torch.equal(out[others], clean[others])


@each_method
def test_rows_of_zeros_give_the_bias_and_subnormal_ones_nearly(kernel, method):
    layer = random_layer(method, 30, 24)
    x = normal(3, 24)
    x[1] = 0
    assert torch.equal(layer(x)[1], layer.bias)
    torch.testing.assert_close(layer(torch.full((2, 24), 1e-41)), layer.bias.expand(2, 30))


@each_method
@pytest.mark.parametrize("magnitude", [1e-30, 1e-15, 1e15, 1e30])
def test_rows_of_any_magnitude_are_as_exact_as_others(kernel, method, magnitude):
    layer = random_layer(method, 30, 24, bias=False)
    x = normal(4, 24)
    expected = layer(x).double() * magnitude
    assert relative_error(layer(x * magnitude), expected) < {"w8a32": 1e-6, "w8a16": 1e-4, "w8a8": 1e-2}[method]


@each_method
def test_inputs_of_any_shape_and_layout_give_what_their_rows_give(kernel, method):
    layer = random_layer(method, 30, 24)
    base = normal(24, 6, 4)
    for x in (base.permute(1, 2, 0), normal(6, 48)[:, ::2], normal(1, 24).expand(5, 24), normal(24, 9).t()):
        assert not x.is_contiguous()
        torch.testing.assert_close(layer(x), layer(x.contiguous()))
    for batch in ((), (1,), (0,), (3, 0, 2), (2, 1, 3)):
        x = normal(*batch, 24)
        out = layer(x)
        assert out.shape == (*batch, 30)
        torch.testing.assert_close(out.reshape(-1, 30), layer(x.reshape(-1, 24)))


@each_method
def test_inputs_of_another_width_or_kind_are_refused_as_ever(kernel, method):
    layer = random_layer(method, 30, 24)
    for x in (normal(3, 23), normal(25), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="24"):
            layer(x)
    with pytest.raises(TypeError, match="int64"):
        layer(torch.ones(3, 24, dtype=torch.int64))


@each_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_give_half_outputs_computed_in_float32(kernel, method, dtype):
    layer = random_layer(method, 30, 24).to(dtype)
    x = normal(5, 24).to(dtype)
    assert torch.equal(layer(x), layer.float()(x.float()).to(dtype)) or dtype is torch.bfloat16
    assert layer.to(dtype)(x).dtype == dtype
    with torch.autocast("cpu", dtype=dtype):
        inside = layer.float()(x.float())
    assert inside.dtype == dtype


@each_method
def test_float64_inputs_are_answered_by_the_formula_in_float64(kernel, method):
    layer = random_layer(method, *LARGE)
    layer(normal(2, LARGE[1]))
    out = layer.double()(normal(2, LARGE[1]).double())
    assert out.dtype == torch.float64
