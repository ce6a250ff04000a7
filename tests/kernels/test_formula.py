"""Quantized forward pass functions: the formulas, the dtypes, the gradients, and the same bits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tinyq_lightning import w8_a8_forward, w8_a16_forward, w8_a32_forward
from tinyq_lightning.kernels.formula import quantized_linear
from tinyq_lightning.kernels.weights import dequantize, quantize_per_row
from tinyq_lightning.methods import METHODS

FORWARDS = {"w8a32": w8_a32_forward, "w8a16": w8_a16_forward, "w8a8": w8_a8_forward}
ACTIVATION_STEPS = {"w8a16": 127 * 256, "w8a8": 127}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-6, torch.float64: 1e-13}

each_method = pytest.mark.parametrize("method", FORWARDS)
KERNELS = ("reference", "exact")
each_kernel = pytest.mark.parametrize("kernel", KERNELS)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(columns=24, rows=10, bias=True, seed=0):
    codes, scales = quantize_per_row(normal(rows, columns, seed=seed))
    return codes, scales, normal(rows, seed=seed + 1) if bias else None


def run(method, kernel, x, codes, scales, bias=None):
    return quantized_linear(METHODS[method], kernel, x, codes, scales, bias)


def formula(method, x, codes, scales, bias=None, activations=None):
    """The method in float64. ``activations``: the dtype in which rows are divided by their scale."""
    x = x.to(activations or torch.float32)
    if method in ACTIVATION_STEPS:
        step = x.abs().amax(-1, keepdim=True) / ACTIVATION_STEPS[method]
        step = torch.where(step == 0, torch.ones_like(step), step)
        x = (x / step).round().double() * step.double()
    out = x.double() @ codes.double().T * scales.double()
    return out if bias is None else out + bias.double()


def assert_near(out, expected, tolerance):
    """As near as ``tolerance`` times the largest of the expected values."""
    assert (out.double() - expected).abs().max() <= tolerance * expected.abs().max()


# --- the formulas ---


@each_method
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_the_formula_in_float64_rounded_to_the_inputs_dtype(method, bias, dtype):
    codes, scales, b = layer(bias=bias)
    x = normal(7, 24, seed=5, dtype=dtype)
    out = FORWARDS[method](x, codes, scales, b)
    assert out.dtype == dtype
    work = torch.float64 if dtype == torch.float64 else torch.float32
    assert_near(out, formula(method, x, codes, scales, b, work), TOLERANCE[dtype])


@each_method
def test_exact_kernel_is_the_formula_too(method):
    codes, scales, b = layer(columns=300)
    x = normal(7, 300, seed=5)
    assert_near(run(method, "exact", x, codes, scales, b), formula(method, x, codes, scales, b), 2e-6)


@each_method
@pytest.mark.parametrize(("rows", "columns"), [(3000, 700), (5, 1_200_000)], ids=["many-rows", "wide-rows"])
def test_weights_larger_than_one_block_give_the_formula(method, rows, columns):
    codes, scales, b = layer(columns, rows)
    x = normal(2, columns, seed=3)
    assert_near(FORWARDS[method](x, codes, scales, b), formula(method, x, codes, scales, b), 1e-4)


def test_each_method_holds_activations_more_finely_than_the_next():
    codes, scales, _ = layer(256, 64)
    x = normal(32, 256, seed=1)
    exact = x.double() @ dequantize(codes, scales, torch.float64).T
    error = [(f(x, codes, scales).double() - exact).norm() / exact.norm() for f in FORWARDS.values()]
    assert error[0] < 1e-6 < error[1] < 1e-4 < error[2] < 0.03


# --- shapes ---


@each_method
@each_kernel
@pytest.mark.parametrize("batch", [(), (1,), (0,), (3, 0, 2), (2, 3), (2, 1, 3, 2)], ids=str)
def test_any_leading_batch_shape_is_kept(method, kernel, batch):
    codes, scales, b = layer()
    x = normal(*batch, 24)
    out = run(method, kernel, x, codes, scales, b)
    assert out.shape == (*batch, 10)
    flat = run(method, kernel, x.reshape(-1, 24), codes, scales, b)
    torch.testing.assert_close(out.reshape(-1, 10), flat)


@each_method
@each_kernel
def test_one_feature_one_output_and_none_at_all(method, kernel):
    for rows, columns in ((1, 1), (4, 1), (1, 5), (0, 5), (4, 0), (0, 0)):
        codes, scales, b = layer(columns, rows)
        out = run(method, kernel, normal(3, columns), codes, scales, b)
        assert out.shape == (3, rows)
        if columns == 0:
            assert torch.equal(out, b.expand(3, rows))


@each_method
@each_kernel
def test_non_contiguous_inputs_give_what_their_copies_give(method, kernel):
    codes, scales, b = layer()
    base = normal(24, 6, 4)
    for x in (base.permute(1, 2, 0), normal(6, 48)[:, ::2], normal(1, 24).expand(5, 24), normal(24, 9).t()):
        assert not x.is_contiguous()
        torch.testing.assert_close(
            run(method, kernel, x, codes, scales, b), run(method, kernel, x.contiguous(), codes, scales, b)
        )


@each_method
@each_kernel
def test_input_of_another_width_is_refused_and_never_answered(method, kernel):
    codes, scales, b = layer()
    for width in (23, 25, 1, 0):
        with pytest.raises(Exception, match="24"):
            run(method, kernel, normal(3, width), codes, scales, b)


@each_method
@each_kernel
def test_input_that_is_not_floating_point_is_refused_as_by_a_linear(method, kernel):
    codes, scales, b = layer()
    for dtype in (torch.int64, torch.bool, torch.complex64):
        x = torch.ones(3, 24, dtype=dtype)
        with pytest.raises(Exception, match=str(dtype).removeprefix("torch.") + "|dtype"):
            run(method, kernel, x, codes, scales, b)


@each_method
@each_kernel
def test_meta_inputs_give_meta_outputs_of_the_right_shape(method, kernel):
    codes, scales, b = (tensor.to("meta") for tensor in layer())
    out = run(method, kernel, torch.ones(3, 24, device="meta", dtype=torch.bfloat16), codes, scales, b)
    assert out.is_meta
    assert (out.shape, out.dtype) == ((3, 10), torch.bfloat16)


# --- autocast ---


@each_method
@each_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_under_autocast_the_dtype_is_the_one_of_a_linear(method, kernel, dtype, given_dtype):
    codes, scales, b = layer()
    linear = nn.Linear(24, 10)
    x = normal(3, 24, dtype=given_dtype)
    with torch.autocast("cpu", dtype=dtype):
        out = run(method, kernel, x, codes, scales, b)
        assert out.dtype == linear(x).dtype
    assert_near(out, formula(method, x, codes, scales, b), 1.6e-2)


@each_method
def test_autocast_leaves_float64_alone_as_a_linear_does(method):
    codes, scales, b = layer()
    linear = nn.Linear(24, 10, dtype=torch.float64)
    x = normal(3, 24, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert FORWARDS[method](x, codes, scales, b).dtype == linear(x).dtype == torch.float64


@each_method
def test_autocast_rounds_the_result_only(method):
    codes, scales, b = layer()
    x = normal(3, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = FORWARDS[method](x, codes, scales, b)
    assert torch.equal(inside, FORWARDS[method](x, codes, scales, b).bfloat16())


# --- gradients ---


@each_method
@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_the_dequantized_linear(method, kernel, dtype):
    codes, scales, bias = layer()
    bias = bias.to(dtype).requires_grad_()
    x = normal(4, 3, 24, seed=9, dtype=dtype).requires_grad_()
    up = normal(4, 3, 10, seed=8, dtype=dtype)
    run(method, kernel, x, codes, scales, bias).backward(up)
    weight = dequantize(codes, scales, torch.float64)
    expected = up.double() @ weight
    assert x.grad.dtype == dtype
    assert_near(x.grad, expected, TOLERANCE[dtype])
    assert_near(bias.grad, up.double().sum((0, 1)), TOLERANCE[dtype])


@each_method
def test_gradient_of_a_block_larger_than_one_is_whole(method):
    codes, scales, _ = layer(700, 3000)
    x = normal(2, 700, seed=9).requires_grad_()
    FORWARDS[method](x, codes, scales).sum().backward()
    expected = dequantize(codes, scales, torch.float64).sum(0).expand(2, -1)
    assert_near(x.grad, expected, 1e-5)


@each_method
def test_bias_gets_its_gradient_where_the_input_needs_none(method):
    codes, scales, bias = layer()
    FORWARDS[method](normal(5, 24), codes, scales, bias.requires_grad_()).sum().backward()
    assert torch.equal(bias.grad, torch.full((10,), 5.0))


@each_method
def test_gradients_under_autocast_are_those_of_the_dequantized_linear(method):
    codes, scales, _ = layer()
    x = normal(4, 24).requires_grad_()
    up = normal(4, 10, seed=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = FORWARDS[method](x, codes, scales)
    out.backward(up.bfloat16())
    assert_near(x.grad, up.bfloat16().double() @ dequantize(codes, scales, torch.float64), 2e-6)


@each_method
def test_backward_keeps_no_float_copy_of_the_weight(method):
    codes, scales, bias = layer(64, 32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        FORWARDS[method](normal(2, 64).requires_grad_(), codes, scales, bias)
    assert not [t for t in kept if t.is_floating_point() and t.numel() >= codes.numel()]


@each_method
@each_kernel
def test_no_graph_is_made_without_need(method, kernel):
    codes, scales, b = layer()
    assert not run(method, kernel, normal(2, 24), codes, scales, b).requires_grad
    with torch.no_grad():
        assert not run(method, kernel, normal(2, 24).requires_grad_(), codes, scales, b).requires_grad


@each_method
def test_kernels_of_one_method_agree(method):
    codes, scales, b = layer(512, 32)
    x = normal(16, 512)
    outputs = [run(method, kernel, x, codes, scales, b).double() for kernel in KERNELS]
    for out in outputs[1:]:
        assert_near(out, outputs[0], 2e-6)


# --- the same bits ---


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 63, 1024])
def test_exact_kernel_gives_a_row_the_same_bits_alone_in_any_batch_and_for_1_and_2_threads(
    method, dtype, columns, threads
):
    codes, scales, b = layer(columns, 200)
    x = normal(65, columns, dtype=dtype)
    whole = run(method, "exact", x, codes, scales, b)
    for count in (1, 2):
        threads(count)
        assert torch.equal(run(method, "exact", x, codes, scales, b), whole)
        for part in (slice(0, 1), slice(7, 9), slice(30, 65), slice(1, 64)):
            assert torch.equal(run(method, "exact", x[part], codes, scales, b), whole[part])
        assert torch.equal(run(method, "exact", x[3], codes, scales, b), whole[3])
        assert torch.equal(run(method, "exact", x.flip(0), codes, scales, b), whole.flip(0))
        assert torch.equal(
            run(method, "exact", x[:64].view(4, 2, 8, columns), codes, scales, b).flatten(0, 2), whole[:64]
        )


@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 80), st.integers(1, 9), st.sampled_from([*FORWARDS]))
@settings(deadline=None, max_examples=150)
def test_exact_kernel_gives_the_same_bits_row_by_row(seed, rows, columns, outputs, method):
    codes, scales, b = layer(columns, outputs, seed=seed)
    x = normal(rows, columns, seed=seed) * 2.0 ** torch.arange(rows).remainder(9).sub(4)[:, None]
    whole = run(method, "exact", x, codes, scales, b)
    assert torch.equal(whole, torch.stack([run(method, "exact", row, codes, scales, b) for row in x]))


# --- unusual rows ---


@each_method
@each_kernel
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_row_is_non_finite_and_leaves_the_others_alone(method, kernel, bad):
    codes, scales, b = layer()
    x = normal(5, 24)
    clean = run(method, kernel, x, codes, scales, b)
    x[2, 7] = bad
    out = run(method, kernel, x, codes, scales, b)
    # a weight of code 0 gives NaN with infinity, and every other one infinity
    assert not torch.isfinite(out[2]).any()
    others = [0, 1, 3, 4]
    assert torch.equal(out[others], clean[others])


@each_method
@each_kernel
def test_a_row_of_zeros_gives_the_bias(method, kernel):
    codes, scales, b = layer()
    x = normal(3, 24)
    x[1] = 0
    assert torch.equal(run(method, kernel, x, codes, scales, b)[1], b)
    assert not run(method, kernel, torch.zeros(2, 24), codes, scales).any()


@each_method
@each_kernel
@pytest.mark.parametrize("magnitude", [1e-30, 1e-15, 1e15, 1e30])
def test_rows_of_any_magnitude_are_as_exact_as_others(method, kernel, magnitude):
    codes, scales, _ = layer()
    x = normal(4, 24) * magnitude
    assert_near(run(method, kernel, x, codes, scales), formula(method, x, codes, scales), 2e-6)


@each_method
@each_kernel
def test_subnormal_rows_stay_finite(method, kernel):
    codes, scales, b = layer()
    out = run(method, kernel, torch.full((2, 24), 1e-41), codes, scales, b)
    torch.testing.assert_close(out, b.expand(2, 10))
