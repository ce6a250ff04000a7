"""Scales, multipliers and codes of four bits: close to what float scales of groups give, and always valid."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyq_lightning.errors import ModelError
from tinyq_lightning.kernels.four_bits import (
    choose_group_scales,
    code_steps,
    group_codes,
    quantize_groups,
    quantize_groups_expanded,
    quantize_groups_with_sqnr,
)
from tinyq_lightning.kernels.nibbles import GROUP, expand, multipliers_of
from tinyq_lightning.kernels.weights import dequantize, weight_sqnr_db


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(*shape):
    values = normal(*shape)
    return values / normal(*shape, seed=1).abs().add(0.3)


def uneven(*shape):
    return normal(*shape) * torch.linspace(0.01, 1, shape[0])[:, None] * torch.linspace(0.2, 1, shape[1])


def db(weight, error):
    return 10 * math.log10(weight.square().sum() / error.square().sum())


def float_group_scales_db(weight):
    """With a float scale for each group, the best of a fine grid."""
    groups = weight.view(-1, GROUP)
    least = torch.full((len(groups),), torch.inf)
    for part in torch.linspace(0.5, 1.1, 61):
        scale = groups.abs().amax(1, True) / 7 * part
        error = (groups - (groups / scale).round().clamp(-8, 7) * scale).square().sum(1)
        least = torch.minimum(least, error)
    return 10 * math.log10(weight.square().sum() / least.sum())


def absmax_group_scales_db(weight):
    groups = weight.view(-1, GROUP)
    scale = groups.abs().amax(1, True) / 7
    return db(groups, groups - (groups / scale).round() * scale)


@pytest.mark.parametrize("make", [normal, heavy_tailed, uneven])
def test_multipliers_lose_less_than_half_a_decibel_against_float_scales_of_groups(make):
    weight = make(256, 512)
    *_, sqnr = quantize_groups_with_sqnr(weight)
    assert sqnr > float_group_scales_db(weight) - 0.3
    assert sqnr > absmax_group_scales_db(weight) + 0.5


@settings(deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 70),
    st.integers(0, 2**16),
    st.floats(-30, 30),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
def test_codes_multipliers_and_scales_are_valid_for_any_weight(rows, columns, seed, exponent, dtype):
    weight = (normal(rows, columns, seed=seed) * 10**exponent).clamp(-6e4, 6e4).to(dtype)
    weight[0, ::3] = 0
    packed, multipliers, scales = quantize_groups(weight)
    codes = expand(packed, multipliers, columns)
    factors = multipliers_of(multipliers, columns)
    assert 1 <= factors.min() <= factors.max() <= 15
    assert scales.dtype == torch.float32
    assert ((scales > 0) & scales.isfinite()).all()
    assert torch.equal(codes, group_codes(weight, factors, scales))
    found, _, _ = quantize_groups_expanded(weight)
    assert torch.equal(found, codes)
    if weight.any() and weight[weight != 0].abs().min() > 1e-30:
        assert weight_sqnr_db(weight, codes, scales) > 12


def test_rows_and_groups_of_zeros_stay_zeros():
    weight = normal(3, 100)
    weight[1] = 0
    weight[2, 32:64] = 0
    packed, multipliers, scales = quantize_groups(weight)
    restored = dequantize(expand(packed, multipliers, 100), scales)
    assert not restored[1].any()
    assert not restored[2, 32:64].any()


def test_the_largest_and_the_smallest_floats_give_finite_weights():
    for value in (3.3e38, 1e-37, 1e-42):
        codes, _, scales = quantize_groups_expanded(torch.full((2, 64), value))
        assert dequantize(codes, scales).isfinite().all()


@pytest.mark.parametrize("size", [1e-36, 1e-37])
def test_multipliers_fit_the_least_scale_of_weights_that_are_next_to_nothing(size):
    weight = size * normal(8, 100)
    codes, _, scales = quantize_groups_expanded(weight)
    assert weight_sqnr_db(weight, codes, scales) > 18


def test_a_row_does_not_depend_on_the_rows_beside_it_nor_on_threads(threads):
    weight = normal(300, 1000)
    whole = quantize_groups(weight)
    threads(1)
    for row in (0, 150, 299):
        alone = quantize_groups(weight[row : row + 1])
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(whole, alone, strict=True))


def test_codes_for_given_scales_are_the_nearest():
    weight = normal(4, 80)
    multipliers, scales = choose_group_scales(weight)
    steps = code_steps(multipliers, scales, 80)
    codes = group_codes(weight, multipliers, scales)
    assert torch.equal(codes, ((weight / steps).round().clamp(-8, 7) * steps / scales[:, None]).round().to(torch.int8))
    assert weight_sqnr_db(weight, codes, scales) == pytest.approx(db(weight, weight - dequantize(codes, scales)), 1e-3)


def test_a_weight_that_is_not_finite_is_refused_with_the_count():
    weight = normal(4, 40)
    weight[1, 3], weight[2, 5] = torch.nan, torch.inf
    with pytest.raises(ModelError, match="2 of 160 weights are not finite"):
        quantize_groups(weight)
    with pytest.raises(ModelError, match="must be floating point"):
        quantize_groups(torch.ones(2, 2, dtype=torch.int32))
    with pytest.raises(ModelError, match="meta device"):
        quantize_groups(torch.ones(2, 2, device="meta"))
