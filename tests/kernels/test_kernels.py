"""The kernels: which is chosen and why, how exact each is, what a layer holds, and graphs."""

import copy
import gc
import math
import os
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import tinyq_lightning.kernels.choice as choice_module
from tinyq_lightning import quantize, w8_a8_forward, w8_a16_forward
from tinyq_lightning.errors import SpecError
from tinyq_lightning.kernels import float16 as float16_module
from tinyq_lightning.kernels import int8 as int8_module
from tinyq_lightning.kernels.base import LONGEST_SUM
from tinyq_lightning.kernels.choice import Choice, choose_kernel
from tinyq_lightning.kernels.float16 import has_float16_product
from tinyq_lightning.kernels.int8 import has_digit_product, has_int8_product, int8_product, pack_int8
from tinyq_lightning.kernels.weights import activation_steps, dequantize
from tinyq_lightning.layers.linear import LAYERS, QuantizedLinear
from tinyq_lightning.methods import METHODS

LARGE = (700, 1100)  # out, in: not too small for any kernel
EXACT_CODES = 63  # products of such codes with any digit stay below 2¹⁵ in pairs, so no processor saturates

each_method = pytest.mark.parametrize("method", METHODS)
int8_only = pytest.mark.parametrize("kernel", ["int8"], indirect=True)


@pytest.fixture(params=["int8", "float16", "float32"])
def kernel(request, monkeypatch):
    """Each kernel in turn; the int8 one also without VNNI, where small codes cannot saturate its products."""
    monkeypatch.setenv("TINYQ_KERNEL", request.param)
    if request.param == "int8":
        if not hasattr(torch.ops.onednn, "qlinear_prepack"):
            pytest.skip("torch was built without oneDNN's int8 product")
        for probe in ("has_int8_product", "has_digit_product"):
            monkeypatch.setattr(choice_module, probe, lambda: True)
    if request.param == "float16" and not has_float16_product():
        pytest.skip("no float16 product on this processor")
    return request.param


def random_layer(method, rows, columns, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = LAYERS[method](columns, rows, bias=bias)
    layer.int8_weights = torch.randint(-EXACT_CODES, EXACT_CODES + 1, (rows, columns), generator=generator).to(
        torch.int8
    )
    layer.scales = torch.rand(rows, generator=generator) * 0.01 + 0.001
    if bias:
        layer.bias = torch.randn(rows, generator=generator)
    return layer


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(layer, x):
    out = x.double() @ dequantize(layer.int8_weights, layer.scales, torch.float64).T
    return out if layer.bias is None else out + layer.bias.double()


def relative_error(out, expected):
    return ((out.double() - expected).norm() / expected.norm()).item()


def median_errors_of_w8a32(shapes, batches, mean=0):
    """Of our layers and of float32 ``linear``; activations and codes of one sign where there is a mean."""
    mine, linears = [], []
    for seed, shape in enumerate(shapes):
        layer = random_layer("w8a32", *shape, seed=seed)
        layer.int8_weights = layer.int8_weights.abs() if mean else layer.int8_weights
        for rows in batches:
            x = mean + normal(rows, shape[1], seed=rows) * (0.01 if mean else 1)
            expected = exact(layer, x)
            mine.append(relative_error(layer(x), expected))
            linears.append(relative_error(nn.functional.linear(x, layer.dequantize(), layer.bias), expected))
    return torch.tensor(mine).median(), torch.tensor(linears).median()


# --- the choice ---


def with_products(monkeypatch, int8=False, digit=False, float16=False):
    monkeypatch.setattr(choice_module, "has_int8_product", lambda: int8)
    monkeypatch.setattr(choice_module, "has_digit_product", lambda: digit)
    monkeypatch.setattr(choice_module, "has_float16_product", lambda: float16)


@each_method
def test_with_vnni_layers_take_int8_and_small_ones_a_float_copy_for_few_rows(method, monkeypatch):
    with_products(monkeypatch, int8=True)
    small, middling, large = (choose_kernel("auto", METHODS[method], size, size) for size in (384, 768, 2048))
    assert {small.kernel, middling.kernel, large.kernel} == {"int8"}
    assert small.few_rows > middling.few_rows > large.few_rows == 0
    few = "float32" if method == "w8a32" else "float32x1"
    assert middling.label == f"{few} to {middling.few_rows - 1} row{'s' * (middling.few_rows > 2)}, int8"
    assert large.label == "int8"
    assert {small.reason, large.reason} == {"the processor has int8 products"}


def test_with_the_product_of_one_digit_w8a8_takes_it_and_the_others_do_not(monkeypatch):
    with_products(monkeypatch, int8=True, digit=True)
    for kernel in ("auto", "int8"):
        chosen = {method: choose_kernel(kernel, METHODS[method], 2048, 2048).kernel for method in METHODS}
        assert chosen == {"w8a32": "int8", "w8a16": "int8", "w8a8": "int8x1"}


def test_finer_methods_need_more_rows_for_int8_to_pay(monkeypatch):
    with_products(monkeypatch, int8=True)
    rows = [choose_kernel("auto", METHODS[method], 384, 384).few_rows for method in ("w8a32", "w8a16", "w8a8")]
    assert rows == sorted(rows, reverse=True)


@each_method
def test_a_layer_takes_a_float_copy_below_the_rows_where_int8_pays(method, monkeypatch):
    with_products(monkeypatch, int8=True)
    layer = random_layer(method, 300, 400)
    rows = layer.choice.few_rows
    few = "float32" if method == "w8a32" else "float32x1"
    layer(normal(rows - 1, 400))
    assert set(layer._forms) == {few}
    layer(normal(rows, 400))
    assert set(layer._forms) == {"int8", few} or set(layer._forms) == {"int8"}


@pytest.mark.parametrize("method", ["w8a16", "w8a8"])
def test_activations_are_rounded_in_any_batch_of_a_small_layer(method, monkeypatch):
    with_products(monkeypatch, int8=True)
    layer, x = random_layer(method, 300, 400), normal(2, 400)
    x[:, 0] = 1000  # as one raw column among normalized ones: steps of 1000 / 127 leave nothing of the others
    formula = {"w8a16": w8_a16_forward, "w8a8": w8_a8_forward}[method]
    by_formula = formula(x, layer.int8_weights, layer.scales, layer.bias)
    for rows in (1, 2, layer.choice.few_rows, 2 * layer.choice.few_rows):
        out = layer(x.repeat(rows, 1)[:rows])
        assert torch.allclose(out[:1], by_formula[:1], rtol=1e-5, atol=1e-5 * by_formula.abs().max())
    if method == "w8a8":
        assert (
            relative_error(by_formula, exact(layer, x)) > 0.01
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
    with_products(monkeypatch, int8=True)
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


@each_method
def test_without_vnni_large_layers_hold_float16_codes(method, monkeypatch):
    with_products(monkeypatch, float16=True)
    small, middling, large = (choose_kernel("auto", METHODS[method], size, size).label for size in (64, 768, 1024))
    assert small == ("float32" if method == "w8a32" else "float32x1")
    if method == "w8a32":  # whose activations are to lose nothing
        assert (middling, large) == ("float32", "float16x2 to 16 rows, reference")
    else:
        assert middling == large == "float16"


@pytest.mark.parametrize("mean", [0, 1])  # of both signs, and where sums grow as fast as they can
@pytest.mark.parametrize("products", [{"float16": True}, {}], ids=["float16", "neither"])
def test_w8a32_is_in_the_median_no_less_exact_than_float32(products, mean, monkeypatch):
    if products and not has_float16_product():
        pytest.skip("no float16 product on this processor")
    with_products(monkeypatch, **products)
    shapes = [(64, 64), (600, 700), (300, 1024), (1100, 1000), (300, 2100), (256, 4096)]
    mine, linear = median_errors_of_w8a32(shapes, (1, 2, 5, 16, 17, 64), mean)
    assert mine <= 1.05 * linear


@each_method
@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (4096, 4096)])
def test_without_either_the_formula_runs(method, shape, monkeypatch):
    with_products(monkeypatch)
    assert choose_kernel("auto", METHODS[method], *shape) == Choice("reference", "no fast and exact int8 product here")


def test_int8_is_int8_however_small_and_exact_sums_where_the_processor_has_none(monkeypatch):
    with_products(monkeypatch, int8=True)
    assert choose_kernel("int8", METHODS["w8a8"], 2, 2).kernel == "int8"
    with_products(monkeypatch, float16=True)
    assert choose_kernel("int8", METHODS["w8a8"], 2, 2) == Choice("exact", "no fast and exact int8 product here")


@pytest.mark.parametrize(("kernel", "instead"), [("auto", "reference"), ("int8", "exact")])
def test_sums_that_could_overflow_int32_are_refused_with_the_reason(kernel, instead, monkeypatch):
    with_products(monkeypatch, int8=True)
    assert choose_kernel(kernel, METHODS["w8a32"], 8, LONGEST_SUM).kernel == "int8"
    refused = choose_kernel(kernel, METHODS["w8a32"], 8, LONGEST_SUM + 1)
    assert refused == Choice(instead, f"sums over {LONGEST_SUM + 1:,} features can overflow int32")


def test_the_longest_sum_fits_int32():
    assert LONGEST_SUM * 127 * 128 < 2**31 <= (LONGEST_SUM + 2) * 127 * 128


def test_reference_is_the_reference_and_layers_without_weights_too():
    assert choose_kernel("reference", METHODS["w8a8"], 4096, 4096) == Choice("reference", "as asked for")
    assert choose_kernel("auto", METHODS["w8a8"], 0, 4096) == Choice("reference", "no weights")


@pytest.mark.parametrize("name", ["reference", "float32", "auto"])
def test_the_environment_goes_before_the_spec(name, monkeypatch):
    expected = choose_kernel("auto", METHODS["w8a32"], 9, 9) if name == "auto" else Choice(name, "as asked for")
    monkeypatch.setenv("TINYQ_KERNEL", name)
    assert choose_kernel("int8", METHODS["w8a32"], 9, 9) == expected


def test_a_typo_in_the_environment_is_named_with_what_is_allowed(monkeypatch):
    monkeypatch.setenv("TINYQ_KERNEL", "int 8")
    with pytest.raises(SpecError, match="TINYQ_KERNEL is 'int 8': it must be one of auto, int8, reference"):
        nn.Sequential(LAYERS["w8a8"](4, 4))(torch.ones(1, 4))


def test_a_layer_tells_its_choice_and_chooses_anew_when_its_kernel_is_set():
    layer = LAYERS["w8a32"](8, 8)
    assert layer.choice == choose_kernel("auto", METHODS["w8a32"], 8, 8)
    layer.kernel = "reference"
    assert layer.choice.kernel == "reference"


def test_an_operator_that_torch_lacks_or_that_fails_is_no_error(monkeypatch):
    monkeypatch.setattr(int8_module, "has_vnni", lambda: True)
    monkeypatch.setattr(int8_module, "pack_int8", lambda codes: (_ for _ in ()).throw(RuntimeError("no such operator")))
    assert has_int8_product.__wrapped__() is False
    for module in (int8_module, float16_module):
        monkeypatch.setattr(module, "has_operator", lambda *names: False)
    assert has_int8_product.__wrapped__() is False
    assert has_float16_product.__wrapped__() is False


def test_a_product_that_saturates_is_not_taken_for_an_exact_one():
    if has_int8_product():
        codes = torch.full((8, 64), -127, dtype=torch.int8)
        digits = torch.zeros(3, 64, dtype=torch.uint8)
        out = int8_product(digits, pack_int8(codes), torch.ones(8), torch.zeros(8, dtype=torch.int32))
        assert (out == 64 * 127 * 128).all()
    elif hasattr(torch.ops.onednn, "qlinear_prepack"):
        assert choose_kernel("auto", METHODS["w8a8"], 4096, 4096).kernel != "int8"


# --- how exact ---

SHAPES = [(64, 64), (1, 37), (5, 1), (130, 96), (200, 1000), LARGE]


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 33])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_w8a32_is_as_exact_as_a_float_product(kernel, shape, rows):
    layer = random_layer("w8a32", *shape)
    x = normal(rows, shape[1])
    expected = exact(layer, x)
    linear = relative_error(nn.functional.linear(x, layer.dequantize(), layer.bias), expected)
    assert relative_error(layer(x), expected) <= linear + (2e-7 if kernel == "int8" else 1e-7)


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
    wanted = layer._formula(x, layer.int8_weights, layer.scales, layer.bias)
    assert relative_error(got, wanted.double()) < {"w8a32": 2e-6, "w8a16": 1e-4, "w8a8": 2e-3}[method]


# --- the same bits ---


@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (200, 1000)], ids=str)
def test_w8a8_gives_the_same_bits_by_each_kernel(kernel, shape, monkeypatch):
    # no sum reaches 2**24, so that float32 holds it exactly too
    layer = random_layer("w8a8", *shape)
    x = normal(9, shape[1])
    wanted = layer(x)
    assert torch.equal(wanted, layer._formula(x, layer.int8_weights, layer.scales, layer.bias))
    monkeypatch.setenv("TINYQ_KERNEL", "")
    for products, name in ({"int8": True, "digit": True}, "int8x1"), ({"int8": True}, "int8"), ({}, "exact"):
        with_products(monkeypatch, **products)
        layer.kernel = "int8"
        assert layer.choice.kernel == name
        assert torch.equal(layer(x), wanted)


def test_w8a8_gives_the_same_bits_by_both_int8_products_for_unusual_rows_too(monkeypatch):
    layer = random_layer("w8a8", *LARGE)
    x = normal(8, LARGE[1]) * torch.tensor([1, 1, 1, 0, 1e-41, 1e-30, 1e15, 1e30])[:, None]
    x[1, 7], x[2, 7] = math.nan, math.inf
    outs = []
    for digit in (True, False):
        with_products(monkeypatch, int8=True, digit=digit)
        layer.kernel = "int8"
        outs.append(layer(x))
    one, other = outs
    assert not torch.stack([one[1:3], other[1:3]]).isfinite().any()
    rows = [0, 3, 4, 5, 6, 7]
    assert torch.equal(one[rows], other[rows])


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
    with_products(monkeypatch, int8=True)
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


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("probe", [has_int8_product, has_digit_product, has_float16_product])
def test_what_a_probe_finds_does_not_depend_on_when_it_is_asked(probe, default_dtype):
    find = probe.__wrapped__
    found = find()
    default_dtype(torch.bfloat16)
    with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu"):
        assert find() is found
    with FakeTensorMode():
        assert find() is found


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


def test_imported_under_another_default_dtype_the_digits_are_the_same():
    code = """
import torch
torch.set_default_dtype(torch.bfloat16)
from tinyq_lightning.kernels.int8 import _digits
numbers = torch.tensor([[1, -5, 100, -127]], dtype=torch.float32)
print([_digits(numbers.clone(), count)[0].tolist() for count in (1, 2)])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[[129, 123, 228, 1], [129, 123, 228, 1]]"


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use of it
def test_forward_mode_derivatives_are_those_of_the_dequantized_linear(kernel):
    layer = random_layer("w8a32", *LARGE)
    x, tangent = normal(4, LARGE[1]), normal(4, LARGE[1], seed=2)
    with torch.no_grad(), forward_ad.dual_level():
        out = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent)))
    assert relative_error(out.tangent, tangent.double() @ layer.dequantize().double().T) < 1e-5


@each_method
def test_a_gradient_makes_no_second_copy(method, monkeypatch):
    monkeypatch.setenv("TINYQ_KERNEL", "float32")
    layer = random_layer(method, 40, 30)
    x = normal(5, 30).requires_grad_()
    layer(x).sum().backward()
    assert relative_error(x.grad, layer.dequantize().double().sum(0).expand(5, -1)) < 1e-6
    copies = [value for value in vars(layer.form("float32")).values() if isinstance(value, torch.Tensor)]
    assert sum(value.dtype == torch.float32 and value.dim() == 2 for value in copies) == 1


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


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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


INT8_KERNELS = [("w8a32", "int8"), ("w8a16", "int8"), ("w8a8", "int8"), ("w8a8", "int8x1")]


@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 80), st.integers(1, 9), st.sampled_from(INT8_KERNELS))
@settings(deadline=None, max_examples=100)
def test_int8_gives_the_same_bits_row_by_row(seed, rows, columns, outputs, method_and_kernel):
    method, kernel = method_and_kernel
    with pytest.MonkeyPatch.context() as patch:
        with_products(patch, int8=True, digit=kernel == "int8x1")
        layer = random_layer(method, outputs, columns, seed=seed)
        layer.kernel = "int8"
        x = normal(rows, columns, seed=seed) * 2.0 ** torch.arange(rows).remainder(9).sub(4)[:, None]
        whole = layer(x)
        assert layer.choice.kernel == kernel
        assert torch.equal(whole, torch.stack([layer(row) for row in x]))


@each_method
@pytest.mark.parametrize("shape", [(1, 1100), (9, 1100), (40, 1100), (2, 3, 1100), (1100,)], ids=str)
def test_an_output_holds_no_more_memory_than_it_has_values(kernel, method, shape):
    out = random_layer(method, *LARGE)(normal(*shape))
    assert out.untyped_storage().nbytes() == 4 * out.numel()


# --- unusual inputs ---


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


# --- gradients ---


@each_method
def test_gradients_are_those_of_the_dequantized_linear(kernel, method):
    layer = random_layer(method, 30, 24)
    layer.bias.requires_grad_()
    x, up = normal(4, 3, 24).requires_grad_(), normal(4, 3, 30, seed=7)
    layer(x).backward(up)
    torch.testing.assert_close(x.grad, (up.double() @ layer.dequantize().double()).float())
    torch.testing.assert_close(layer.bias.grad, up.sum((0, 1)))


@each_method
def test_a_bias_that_can_be_trained_changes_no_bit(kernel, method):
    layer = random_layer(method, 30, 24)
    x = normal(4, 24)
    before = layer(x)
    layer.bias.requires_grad_()
    assert torch.equal(layer(x), before)


# --- what a layer holds ---


def packed_layer(method="w8a16"):
    layer = random_layer(method, *LARGE)
    return layer, layer.int8_weights.clone(), normal(3, LARGE[1])


BESIDE_CODES = ("float32", "float32x1", "float16x2")


def holds_plain_codes(layer):
    return layer._buffers["int8_weights"] is not None


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
    assert first._forms.get(kernel) is second._forms.get(kernel)
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


# --- transforms and graphs ---


@each_method
def test_vmap_and_jit_trace_go_by_the_formula(kernel, method):
    layer = random_layer(method, 30, 24)
    x = normal(4, 5, 24)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(layer)(x), layer(x), rtol=1e-2, atol=1e-2)


@each_method
@pytest.mark.parametrize("first", ["packed", "fresh"])
def test_a_layer_is_one_operator_in_a_compiled_graph(kernel, method, first):
    layer = random_layer(method, *LARGE)
    x = normal(3, LARGE[1])
    if first == "packed":
        layer(x)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(nn.Sequential(layer, nn.ReLU()), backend=backend, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x).relu())
        assert torch.equal(compiled(x), layer(x).relu())
    assert len(graphs) == 1
    calls = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert calls[0] == "tinyq_lightning.packed_layer.default"
    assert len(calls) == 2


@each_method
def test_a_called_layer_whose_bias_is_trained_compiles_too(kernel, method):
    layer = random_layer(method, *LARGE)
    layer.bias.requires_grad_()
    x = normal(4, LARGE[1])
    wanted = layer(x)
    compiled = torch.compile(nn.Sequential(layer), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        out = compiled(x)
        torch.testing.assert_close(out, wanted, rtol=1e-3, atol=2e-3)
    out.sum().backward()
    assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, 4))


@each_method
def test_a_compiled_layer_sees_new_weights_and_gives_gradients(kernel, method):
    torch._dynamo.reset()
    layer = random_layer(method, *LARGE)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, up = normal(3, LARGE[1]).requires_grad_(), normal(3, LARGE[0])
    compiled(x).backward(up)
    torch.testing.assert_close(x.grad, up @ layer.dequantize())
    layer.load_state_dict(random_layer(method, *LARGE, seed=9).state_dict())
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


@each_method
@pytest.mark.parametrize("first", ["packed", "fresh"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_exported_layer_is_the_formula_with_int8_codes(kernel, method, first):
    layer = random_layer(method, *LARGE)
    x = normal(3, LARGE[1])
    if first == "packed":
        layer(x)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-2, atol=1e-2)
    held = [*program.state_dict.values(), *program.constants.values()]
    assert [tensor.shape for tensor in held if tensor.dtype == torch.int8] == [torch.Size(LARGE)]
    assert not [node for node in program.graph.nodes if "tinyq" in str(node.target)]


# --- whole models ---


def test_attention_runs_packed_for_itself_and_across(kernel):
    attention = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    float_attention = copy.deepcopy(attention)
    model = nn.ModuleList([attention])
    quantize(model, "w8a32")
    x, memory = normal(2, 5, 64), normal(2, 7, 64, seed=2)
    with torch.no_grad():
        for arguments in ((x, x, x), (x, memory, memory), (x, memory, memory * 2)):
            wanted, _ = float_attention(*arguments)
            if kernel == "int8" and not has_int8_product():
                break  # codes of ±127 would saturate here
            got, _ = model[0](*arguments)
            assert relative_error(got, wanted.double()) < 0.02
    layers = [each for each in model.modules() if isinstance(each, QuantizedLinear)]
    assert len(layers) == 2


def test_packages_without_a_fast_kernel_import_and_run():
    code = """
import torch, torch.nn as nn
from tinyq_lightning.kernels import float16, int8
int8.has_vnni = lambda: False
int8.has_operator = float16.has_operator = lambda *names: False
from tinyq_lightning import quantize
model = nn.Sequential(nn.Linear(600, 600))
quantize(model, "w8a32")
assert model[0].choice.kernel == "reference", model[0].choice
assert model(torch.randn(2, 600)).shape == (2, 600)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize("hidden", ["int8", "int8,float16", "quantized"])
def test_an_environment_variable_hides_products_to_play_another_machine(hidden):
    program = """
import torch
from tinyq_lightning.kernels.int8 import has_digit_product, has_int8_product
from tinyq_lightning.kernels.float16 import has_float16_product
print(has_int8_product(), has_digit_product(), has_float16_product())
"""
    without = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "TINYQ_WITHOUT": hidden}
    )
    int8, digit, float16 = without.stdout.split()
    assert (int8, digit) == ("False", "False") if "int8" in hidden else digit == "False"
    assert float16 == "False" if hidden != "int8" else float16 == str(has_float16_product())


def test_hiding_what_there_is_not_is_an_error():
    program = "from tinyq_lightning.kernels.int8 import has_int8_product; has_int8_product()"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "TINYQ_WITHOUT": "vnni"}
    )
    assert "TINYQ_WITHOUT hides vnni: it takes int8, float16, quantized" in done.stderr
