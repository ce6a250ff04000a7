"""What gives the same bits: other kernels, batches, calls, threads and defaults."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    LARGE,
    by_formula,
    each_method,
    exact,
    int8_only,
    normal,
    random_layer,
    relative_error,
    with_products,
)
from torch import nn

from tinyq_lightning import quantize, w8_a8_forward, w8_a16_forward
from tinyq_lightning.kernels import fbgemm, fixed_point, split
from tinyq_lightning.kernels.float16 import has_float16_product
from tinyq_lightning.methods import METHODS


@pytest.mark.parametrize("method", ["w8a16", "w8a8"])
def test_activations_are_rounded_in_any_batch_of_a_small_layer(method, monkeypatch):
    with_products(monkeypatch, has_plain=True)
    layer, x = random_layer(method, 300, 400), normal(2, 400)
    x[:, 0] = 1000  # as one raw column among normalized ones: steps of 1000 / 127 leave nothing of the others
    formula = {"w8a16": w8_a16_forward, "w8a8": w8_a8_forward}[method]
    wanted = formula(x, layer.int8_weights, layer.scales, layer.bias)
    for rows in (1, 2, 30, 100):
        out = layer(x.repeat(rows, 1)[:rows])
        assert torch.allclose(out[:1], wanted[:1], rtol=1e-5, atol=1e-5 * wanted.abs().max())
    if method == "w8a8":
        assert (
            relative_error(wanted, exact(layer, x)) > 0.01
        )  # so a layer that does not round is told from one that does


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@each_method
@pytest.mark.parametrize("shape", [(64, 256), (4, 16, 256), (256,)], ids=str)
def test_the_first_call_has_the_bits_of_all_later_ones_with_gradients_or_without(method, shape, grad):
    model = nn.Sequential(nn.Linear(256, 128))  # its bias wants a gradient
    quantize(model, method)
    x = normal(*shape)
    with torch.set_grad_enabled(grad):
        first, second = model(x), model(x)
    with torch.set_grad_enabled(not grad):
        third = model(x)
    assert torch.equal(first, second)
    assert torch.equal(second, third)
    turned = x.clone().requires_grad_()
    assert torch.equal(model(turned), first)


@pytest.mark.parametrize("shape", [(4, 400), (2, 2, 400), (400,), (0, 400)], ids=str)
def test_few_rows_by_a_float_copy_are_what_nn_linear_gives_in_every_way(shape, monkeypatch):
    with_products(monkeypatch, has_plain=True)
    layer = random_layer("w8a32", 300, 400)
    linear = nn.Linear(400, 300)
    linear.weight.data, linear.bias.data = layer.dequantize(), layer.bias.data
    x = normal(*shape)
    layer(x)
    assert set(layer._forms) == {"float32"}
    assert torch.equal(layer(x), linear(x))
    batched = torch.stack([x, x + 1])
    assert torch.allclose(torch.vmap(layer)(batched), torch.vmap(linear)(batched), atol=1e-5)
    grads = [torch.autograd.grad(each(leaf := x.clone().requires_grad_()).sum(), leaf)[0] for each in (layer, linear)]
    assert torch.equal(*grads)
    with pytest.raises(ValueError, match=r"the input must have shape \[..., 400\], got \[4, 399\]"):
        layer(normal(4, 399))
    out = layer(x)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(layer(x), out.to(dtype))
    with torch.no_grad():
        layer.scales.mul_(2)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.dequantize(), layer.bias))


@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (200, 1000)], ids=str)
def test_w8a8_gives_the_same_bits_by_each_kernel(kernel, shape, monkeypatch):
    # no sum reaches 2**24, so that float32 holds it exactly too
    layer = random_layer("w8a8", *shape)
    x = normal(9, shape[1])
    wanted = layer(x)
    assert torch.equal(wanted, by_formula(layer, x))
    monkeypatch.setenv("TINYQ_KERNEL", "")
    for products, name in (
        ({"has_onednn": True, "has_fbgemm": True}, "int8-fbgemm"),
        ({"has_onednn": True}, "int8-onednn"),
        (
            {"has_plain": True, "has_onednn": True},
            "int8-onednn" if shape[1] == 1 or kernel == "int8-packed" else "int8",
        ),
        ({"has_split": True}, "exact" if shape[1] == 1 else "int8-split"),
        ({}, "exact"),
    ):
        with_products(monkeypatch, **products)
        layer.kernel = "int8"
        assert layer.choice.kernel == name
        assert torch.equal(layer(x), wanted)


def test_w8a8_gives_the_same_bits_by_each_int8_product_for_unusual_rows_too(monkeypatch):
    layer = random_layer("w8a8", *LARGE)
    x = normal(8, LARGE[1]) * torch.tensor([1, 1, 1, 0, 1e-41, 1e-30, 1e15, 1e30])[:, None]
    x[1, 7], x[2, 7] = math.nan, math.inf
    outs = []
    for products in (("plain",), ("onednn",), ("onednn", "fbgemm"), ("split",)):
        with_products(monkeypatch, **{f"has_{name}": True for name in products})
        layer.kernel = "int8"
        outs.append(layer(x))
    one, *others = outs
    rows = [0, 3, 4, 5, 6, 7]
    for other in others:
        assert not torch.stack([one[1:3], other[1:3]]).isfinite().any()
        assert torch.equal(one[rows], other[rows])


@pytest.mark.parametrize("method", ["w8a32", "w8a16"])
@pytest.mark.parametrize("rows", [1, 9, 700])
def test_plain_and_packed_codes_give_the_same_bits(method, rows, monkeypatch):
    layer, x, outs = random_layer(method, *LARGE), normal(rows, LARGE[1]), []
    for name in ("plain", "onednn"):
        with_products(monkeypatch, **{f"has_{name}": True})
        layer.kernel = "int8"
        outs.append(layer(x))
    assert torch.equal(*outs)


@each_method
@pytest.mark.parametrize("products", [("plain",), ("onednn",), ("onednn", "fbgemm"), ("split",)], ids=" ".join)
def test_blocks_of_rows_are_as_large_as_the_processor_wants_and_change_no_bit(products, method, monkeypatch):
    one = METHODS[method].digits == 1
    if products[-1] in ("fbgemm", "split") and not one:
        pytest.skip("a product of one digit")
    with_products(monkeypatch, **{f"has_{name}": True for name in products})
    monkeypatch.setattr(fixed_point, "_BLOCK_WITH_AMX", 300 * LARGE[1])
    monkeypatch.setattr(fixed_point, "_WHOLE_WITH_AMX", 800 * LARGE[1])
    finish, sizes = fixed_point.plus_bias, []
    for module in (fixed_point, fbgemm, split):
        monkeypatch.setattr(module, "plus_bias", lambda out, bias: sizes.append(len(out)) or finish(out, bias))
    layer, x = random_layer(method, *LARGE), normal(900, LARGE[1])
    layer.kernel = "int8"
    out = layer(x)
    assert sizes == [561, 339]  # of 393,216 outputs at most
    monkeypatch.setattr(fixed_point, "has_amx", lambda: True)
    for rows, blocks in ((900, [300, 300, 300] if one else [561, 339]), (800, [800] if one else [561, 239])):
        sizes.clear()
        assert torch.equal(layer(x[:rows]), out[:rows])
        assert sizes == blocks


@pytest.mark.parametrize("engine", ["onednn", "qnnpack"])
def test_an_engine_chosen_for_torchs_own_quantization_changes_nothing_and_stays(kernel, engine, monkeypatch):
    if engine not in torch.backends.quantized.supported_engines:
        pytest.skip(f"torch was built without {engine}")
    x = normal(3, LARGE[1])
    wanted = [random_layer(method, *LARGE)(x) for method in METHODS]
    monkeypatch.setattr(torch.backends.quantized, "engine", engine)
    for method, out in zip(METHODS, wanted, strict=True):
        assert torch.equal(random_layer(method, *LARGE)(x), out)
    assert torch.backends.quantized.engine == engine
    assert has_float16_product.__wrapped__() is has_float16_product()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@each_method
def test_default_dtype_and_device_change_no_bit(kernel, method, dtype, default_dtype):
    layer = random_layer(method, *LARGE)
    x = normal(4, LARGE[1])
    wanted = layer(x)
    layer.unpack()
    default_dtype(dtype)
    with torch.device("meta"):
        assert torch.equal(layer(x), wanted)


@each_method
@pytest.mark.parametrize("shape", [(3000, 700), (700, 3), (2, 600_000), (0, 7), (7, 0)], ids=str)
def test_the_formula_is_the_same_without_gradients_block_by_block(method, shape):
    layer = random_layer(method, *shape)
    layer.kernel = "reference"
    for x in (
        normal(3, shape[1]),
        normal(shape[1]),
        normal(2, 3, shape[1]),
        normal(shape[1], 4).t(),
        normal(0, shape[1]),
    ):
        with torch.enable_grad():
            wanted = layer(x)
        with torch.no_grad():
            got = layer(x)
        assert got.is_contiguous()
        torch.testing.assert_close(got, wanted.detach(), rtol=1e-4, atol=1e-4)


@int8_only
@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 63, 1024])
def test_int8_gives_a_row_the_same_bits_alone_in_any_batch_and_for_1_and_2_threads(
    kernel, method, dtype, columns, threads
):
    layer = random_layer(method, 200, columns)
    x = normal(65, columns).to(dtype)
    whole = layer(x)
    for count in (1, 2):
        threads(count)
        assert torch.equal(layer(x), whole)
        for part in (slice(0, 1), slice(7, 9), slice(30, 65), slice(1, 64)):
            assert torch.equal(layer(x[part]), whole[part])
        assert torch.equal(layer(x[3]), whole[3])
        assert torch.equal(layer(x.flip(0)), whole.flip(0))
        assert torch.equal(layer(x[:64].view(4, 2, 8, columns)).flatten(0, 2), whole[:64])


INT8_KERNELS = [(method, kernel) for method in METHODS for kernel in ("plain", "onednn")] + [("w8a8", "fbgemm")]


@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 80), st.integers(1, 9), st.sampled_from(INT8_KERNELS))
@settings(deadline=None, max_examples=100)
def test_int8_gives_the_same_bits_row_by_row(seed, rows, columns, outputs, method_and_kernel):
    method, kernel = method_and_kernel
    with pytest.MonkeyPatch.context() as patch:
        with_products(
            patch,
            has_plain=kernel == "plain",
            has_onednn=kernel != "plain" or columns == 1,
            has_fbgemm=kernel == "fbgemm",
        )
        layer = random_layer(method, outputs, columns, seed=seed)
        layer.kernel = "int8"
        x = normal(rows, columns, seed=seed) * 2.0 ** torch.arange(rows).remainder(9).sub(4)[:, None]
        whole = layer(x)
        plain = kernel == "plain" and columns > 1
        assert layer.choice.kernel == ("int8" if plain else f"int8-{kernel.replace('plain', 'onednn')}")
        assert torch.equal(whole, torch.stack([layer(row) for row in x]))


@each_method
@pytest.mark.parametrize("shape", [(1, 1100), (9, 1100), (40, 1100), (2, 3, 1100), (1100,)], ids=str)
def test_an_output_holds_no_more_memory_than_it_has_values(kernel, method, shape):
    out = random_layer(method, *LARGE)(normal(*shape))
    assert out.untyped_storage().nbytes() == 4 * out.numel()


@each_method
def test_scales_of_any_strides_are_right(method, kernel):
    layer, x = random_layer(method, *LARGE), normal(5, LARGE[1])
    wanted = layer(x)
    layer.scales = torch.stack([layer.scales, torch.rand(LARGE[0])], 1)[:, 0]
    assert torch.equal(layer(x), wanted)
