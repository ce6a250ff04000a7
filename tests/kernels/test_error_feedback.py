import pytest
import torch

from tinyq_lightning.kernels import (
    Moments,
    collapse,
    dequantize,
    expand,
    feedback_codes,
    multipliers_of,
    quantize_groups_expanded,
)
from tinyq_lightning.kernels.nibbles import pack_nibbles


def correlated(places, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=torch.Generator().manual_seed(9)) / columns**0.5
    return torch.randn(places, columns, generator=generator) @ mixed + torch.rand(
        columns, generator=torch.Generator().manual_seed(8)
    )


def moments_of(x, parts=1):
    made = Moments(parts, x.shape[-1])
    made.add(x.expand(parts, -1, -1))
    return made


def quantized(weight):
    """Codes, multipliers and scales without data."""
    codes, packed, scales = quantize_groups_expanded(weight)
    return codes, multipliers_of(packed, weight.shape[1]), scales


@pytest.mark.parametrize("columns", [33, 96, 300])
def test_outputs_on_other_inputs_have_less_error_than_with_the_nearest_codes(columns):
    weight = torch.randn(24, columns, generator=torch.Generator().manual_seed(1))
    codes, multipliers, scales = quantized(weight)

    chosen = feedback_codes(weight, multipliers, scales, moments_of(correlated(2000, columns)), centred=False)

    others = moments_of(correlated(500, columns, seed=1))
    before = others.output_errors(dequantize(codes, scales) - weight)[0]
    after = others.output_errors(dequantize(chosen, scales) - weight)[0]
    assert after < 0.7 * before


def test_with_a_bias_that_takes_off_the_mean_centred_moments_leave_less_error():
    weight, found = (
        torch.randn(32, 64, generator=torch.Generator().manual_seed(1)),
        moments_of(correlated(2000, 64) + 3),
    )
    _, multipliers, scales = quantized(weight)

    def error(centred):
        codes = feedback_codes(weight, multipliers, scales, found, centred=centred)
        change = dequantize(codes, scales) - weight
        return found.output_errors(change, [-found.mean_change(change)])[0]

    assert error(centred=True) < error(centred=False)


def test_codes_of_four_bits_are_multiples_of_their_multipliers_and_can_be_packed():
    weight = torch.randn(8, 70)
    _, multipliers, scales = quantized(weight)

    codes = feedback_codes(weight, multipliers, scales, moments_of(correlated(300, 70)), centred=False)

    packed = pack_nibbles(multipliers)
    assert torch.equal(expand(collapse(codes, packed), packed, 70), codes)


def test_inputs_without_correlation_give_the_nearest_codes():
    weight = torch.randn(16, 64)
    codes, multipliers, scales = quantized(weight)
    found = Moments(1, 64)
    found.add(torch.eye(64)[None])

    assert torch.equal(feedback_codes(weight, multipliers, scales, found, centred=False), codes)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(10, 20),
        torch.ones(10, 20),
        correlated(3, 20),
        torch.cat([torch.zeros(30, 10), correlated(30, 10)], 1),
        1e6 * correlated(50, 20),
        1e-12 * correlated(50, 20),
    ],
    ids=["nothing", "constant", "few", "dead features", "large", "small"],
)
@pytest.mark.parametrize("centred", [True, False])
def test_any_inputs_give_codes_that_are_no_worse_on_these_inputs(x, centred):
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(1))
    codes, multipliers, scales = quantized(weight)
    found = moments_of(x)

    chosen = feedback_codes(weight, multipliers, scales, found, centred=centred)

    def error(codes):
        change = dequantize(codes, scales) - weight
        return found.output_errors(change, [-found.mean_change(change) if centred else None])[0]

    assert error(chosen) <= error(codes) * 1.05 + 1e-12


def test_parts_of_the_rows_have_codes_by_their_own_inputs():
    weight = torch.randn(8, 30)
    _, multipliers, scales = quantized(weight)
    inputs = [correlated(200, 30, seed=seed) * torch.rand(30) for seed in range(2)]
    both = Moments(2, 30)
    both.add(torch.stack(inputs))

    together = feedback_codes(weight, multipliers, scales, both, centred=True)

    for part, x in enumerate(inputs):
        rows = slice(4 * part, 4 * part + 4)
        alone = feedback_codes(weight[rows], multipliers[rows], scales[rows], moments_of(x), centred=True)
        assert torch.equal(together[rows], alone)


def test_the_same_moments_give_the_same_codes_and_nothing_given_is_changed():
    weight, found = torch.randn(8, 300), moments_of(correlated(200, 300))
    _, multipliers, scales = quantized(weight)
    before = [each.clone() for each in (weight, scales, multipliers, *found.tensors())]

    first, second = (feedback_codes(weight, multipliers, scales, found, centred=True) for _ in range(2))

    assert torch.equal(first, second)
    assert all(map(torch.equal, before, (weight, scales, multipliers, *found.tensors())))
