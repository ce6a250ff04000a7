import pytest
import torch

from tinyq_lightning.kernels import Moments, moments, moments_bytes


def inputs(parts=1, places=50, columns=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(parts, places, columns, generator=generator) + torch.rand(columns, generator=generator)


def filled(x):
    made = Moments(x.shape[0], x.shape[2])
    for some in x.split(7, 1):
        made.add(some)
    return made


def error(x, change, bias):
    """The mean squared change of the outputs, one input at a time, in float64."""
    rows = change.double().unflatten(0, (len(x), -1))
    out = x.double() @ rows.transpose(1, 2) + bias.double().view(len(x), 1, -1)
    return out.square().mean(1).sum().item()


@pytest.mark.parametrize("parts", [1, 3])
def test_the_error_of_outputs_is_what_the_inputs_themselves_give(parts):
    x, change, bias = inputs(parts), torch.randn(6, 12), torch.randn(6)
    found = filled(x)

    assert found.output_errors(change, [bias])[0] == pytest.approx(error(x, change, bias), rel=1e-5)
    assert found.output_errors(change)[0] == pytest.approx(error(x, change, torch.zeros(6)), rel=1e-5)


def test_a_bias_that_takes_the_mean_change_off_leaves_the_least_error():
    found, change = filled(inputs(2)), torch.randn(4, 12)
    best = -found.mean_change(change)

    least = found.output_errors(change, [best])[0]

    assert all(found.output_errors(change, [best + step])[0] > least for step in (0.1, -0.1))


def test_wide_inputs_are_taken_in_blocks_and_their_means_count_in_full(monkeypatch):
    x, change = inputs(places=4000), torch.randn(5, 12)
    whole = filled(x).output_errors(change)[0]

    monkeypatch.setattr(moments, "BLOCK_COLUMNS", 5)
    found = filled(x)

    assert [each.shape[-1] for each in found.blocks] == [5, 5, 2]
    assert sum(each.numel() * each.element_size() for each in found.tensors()) <= moments_bytes(1, 12) + 8
    assert found.output_errors(change)[0] == pytest.approx(whole, rel=0.1)  # the features are independent


def test_moments_of_several_calls_and_processes_are_summed():
    x = inputs()
    one, other = filled(x[:, :20]), filled(x[:, 20:])

    one.add_all(other)

    change = torch.randn(3, 12)
    assert one.output_errors(change)[0] == pytest.approx(filled(x).output_errors(change)[0], rel=1e-6)
    assert one.counts.tolist() == [50]


def test_parts_may_have_different_numbers_of_inputs():
    made = Moments(2, 12)
    made.add(inputs(places=10), 0)
    assert made.is_empty
    made.add(inputs(places=30, seed=1), 1)

    assert not made.is_empty
    assert made.counts.tolist() == [10, 30]
    change = torch.randn(4, 12)
    expected = error(inputs(places=10), change[:2], torch.zeros(2)) + error(
        inputs(places=30, seed=1), change[2:], torch.zeros(2)
    )
    assert made.output_errors(change)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_inputs_that_are_not_finite_or_too_large_to_square_are_told(bad):
    x = inputs()
    assert filled(x).is_finite
    x[0, 3, 4] = bad
    assert not filled(x).is_finite
