"""How layers are called, what that takes, and what is decided from it: given timings, never measured ones."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tinyq_lightning import QuantizationSpec
from tinyq_lightning.layers.linear import W8A32LinearLayer
from tinyq_lightning.plan.swap import Swap
from tinyq_lightning.search.layer_calls import MAX_ROWS, Call, counted_calls, representative
from tinyq_lightning.search.timing import SPEEDUP_LOST, Stopwatch, Timing, left_float, time_call


def called(float_ms, ms, rows=64, weight=1.0):
    return weight, Call(rows), Timing(float_ms, ms)


def swap_of(model, method="w8a32"):
    return Swap(model, QuantizationSpec(method=method))


# The decision


def test_what_loses_is_left_float_and_the_reason_says_by_how_much_and_where():
    changes = left_float({"slow": [called(1.0, 1.31, weight=5.0)], "fast": [called(1.0, 0.4, weight=5.0)]}, {})
    assert changes == {
        "slow": ("float", "left float: quantized, it took 1.31x the time of float at 64 rows, measured here"),
    }


@pytest.mark.parametrize(("ms", "changed"), [(1.0, False), (1.05, False), (1.06, True)])
def test_a_loss_within_the_noise_is_none(ms, changed):
    assert (1 / ms < SPEEDUP_LOST) == changed
    assert bool(left_float({"layer": [called(1.0, ms)]}, {})) == changed


def test_row_counts_weigh_as_often_as_they_come():
    wins_often = [called(1.0, 0.5, 64, weight=99.0), called(1.0, 9.0, 3)]
    loses_often = [called(1.0, 0.5, 64), called(1.0, 9.0, 3, weight=99.0)]
    changes = left_float({"a": wins_often, "b": loses_often}, {})
    assert list(changes) == ["b"]
    assert "8.91x the time of float at 3 to 64 rows," in changes["b"][1]
    assert "at 1 row," in left_float({"c": [called(1.0, 2.0, 1)]}, {})["c"][1]


def test_layers_that_share_a_weight_are_judged_as_one():
    work = {"a": [called(1.0, 1.5)], "b": [called(1.0, 0.4)], "c": [called(1.0, 1.8)]}
    ties = {"a": ("b",), "b": ("a",)}
    assert list(left_float(work, ties)) == ["c"]
    assert list(left_float(work | {"b": [called(1.0, 0.9)]}, ties)) == ["a", "c"]


def test_a_layer_that_was_not_called_is_not_judged():
    assert left_float({"layer": []}, {}) == {}


# The calls to time


calls = st.dictionaries(st.builds(Call, rows=st.integers(0, 5000)), st.integers(1, 1000), max_size=30)


@given(calls)
def test_a_handful_of_calls_stand_for_all_rows(counts):
    found = representative(counts)
    assert sum(weight * call.rows for call, weight in found.items()) == pytest.approx(
        sum(call.rows * count for call, count in counts.items())
    )
    assert len(found) <= MAX_ROWS.bit_length()
    assert all(1 <= call.rows <= MAX_ROWS for call in found)


def test_the_usual_batch_stands_for_those_near_it():
    found = representative({Call(64): 99, Call(96): 1, Call(12): 1, Call(64, torch.bfloat16): 4})
    assert found == {Call(64): 99 + 96 / 64, Call(12): 1, Call(64, torch.bfloat16): 4}
    assert representative({Call(6304): 10}) == {Call(MAX_ROWS): 10 * 6304 / MAX_ROWS}


def test_calls_are_counted_in_the_float_and_in_the_quantized_model_and_nothing_stays():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    swap, found = swap_of(model), {}
    with torch.no_grad(), counted_calls(swap, found):
        model(torch.ones(3, 5, 8))
        with swap, torch.autocast("cpu", torch.bfloat16):
            model(torch.ones(7, 8))
    floats = {Call(15): 1, Call(7, torch.float32, torch.bfloat16): 1}
    assert found["0"] == floats
    assert found["2"] == {Call(15): 1, Call(7, torch.bfloat16, torch.bfloat16): 1}
    with swap:
        for module in model:
            assert not module._forward_pre_hooks
            assert "forward_rows" not in vars(module)


def test_attention_is_counted_where_it_takes_its_projections_apart_and_for_nested_tensors():
    model = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True))
    swap, found = swap_of(model), {}
    assert swap.fused
    query, key = torch.ones(2, 3, 8), torch.ones(2, 5, 8)
    nested = torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)], layout=torch.jagged)
    with torch.no_grad(), swap, counted_calls(swap, found):
        model[0](query, key, key)
    assert found["0.in_proj"] == {Call(6, part=(None, 8)): 1, Call(10, part=(8, None)): 1}
    assert found["0.out_proj"] == {Call(6): 1}
    with torch.no_grad(), counted_calls(linear := swap_of(nn.Sequential(nn.Linear(8, 8))), found := {}), linear:
        next(linear.pairs())[2](nested)
    assert found["0"] == {Call(5): 1}, "once, with the tokens"


# Timing


class Watch:
    """A timer that counts: float takes 1 ms, int8 as many as there are rows."""

    def __init__(self, monkeypatch):
        self.timed = []
        monkeypatch.setattr("tinyq_lightning.search.timing.time_call", self)

    def __call__(self, layers, call):
        self.timed.append((len(layers), call))
        return 1.0, float(call.rows)


def test_each_shape_and_call_is_timed_once_with_all_its_layers(monkeypatch):
    watch, stopwatch = Watch(monkeypatch), Stopwatch()
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
    swap = swap_of(model)
    with torch.no_grad(), stopwatch.watching(swap):
        model(torch.ones(4, 8))
        model(torch.ones(4, 8))
    for _ in range(2):
        assert list(stopwatch.slower(swap)) == ["0", "1", "2"]
    assert watch.timed == [(2, Call(4)), (1, Call(4))]
    stopwatch.slower(swap_of(model, "w8a8"))
    assert len(watch.timed) == len(stopwatch.timings) == 4, "another method takes another time"


def test_what_cannot_be_timed_is_noted_and_not_judged(monkeypatch):
    def time_call(layers, call):
        if layers[0][0].out_features == 4:
            raise RuntimeError("out of memory\nby 4 GiB")
        return 1.0, 2.0

    monkeypatch.setattr("tinyq_lightning.search.timing.time_call", time_call)
    model, stopwatch = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), Stopwatch()
    swap = swap_of(model)
    with torch.no_grad(), stopwatch.watching(swap):
        model(torch.ones(3, 8))
    for _ in range(2):
        assert list(stopwatch.slower(swap)) == ["0"]
    told = stopwatch.to_dict()
    assert len(told["timings"]) == 1
    assert [(each["layer"].split(", bias")[0], each["reason"]) for each in told["not_timed"]] == [
        ("in_features=8, out_features=4", "RuntimeError: out of memory")
    ]


def test_a_loss_is_measured_twice_and_the_shorter_medians_count(monkeypatch):
    rounds = []

    def in_turns(pairs, more, device="cpu"):
        rounds.append(len(pairs))
        return Timing(1.0, 5.0) if len(rounds) == 1 else Timing(1.1, 0.5)

    monkeypatch.setattr("tinyq_lightning.search.timing.time_in_turns", in_turns)
    linear = nn.Linear(8, 8)
    pair = (linear, W8A32LinearLayer.from_linear(linear))
    assert time_call([pair], Call(4)) == (1.0, 0.5)
    assert len(rounds) == 2


@pytest.mark.parametrize(
    "call", [Call(1), Call(300), Call(4, torch.float32, torch.bfloat16), Call(4, torch.bfloat16), Call(5, part=(8, 24))]
)
@pytest.mark.parametrize("inference", [False, True])
def test_timing_leaves_layers_and_random_state_as_they_are(call, inference):
    linears = [nn.Linear(8, 24, dtype=call.dtype) for _ in range(3)]
    layers = [(linear, W8A32LinearLayer.from_linear(linear)) for linear in linears]
    before = [copy.deepcopy(module.state_dict()) for pair in layers for module in pair]
    random = torch.get_rng_state()
    with torch.inference_mode(inference):
        float_ms, ms = time_call(layers, call)
    assert float_ms > 0
    assert ms > 0
    assert torch.equal(random, torch.get_rng_state())
    now = [module.state_dict() for pair in layers for module in pair]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(before, now, strict=True) for name in a)
    layers[0][1](torch.ones(1, 8, dtype=call.dtype, requires_grad=True)).sum().backward()


def test_layers_are_timed_in_eval_mode_and_left_in_theirs_without_random_numbers():
    model = nn.Sequential(nn.LSTM(8, 8, 2, dropout=0.5))
    swap = swap_of(model)
    ((_, module, layer),) = swap.pairs()
    seen = []
    for each in (module, layer):
        each.forward = lambda *args, each=each: seen.append(each.training) or type(each).forward(each, *args)
    before = torch.get_rng_state()
    time_call([(module, layer)], Call(5 * 3 * 8, sizes=(5, 3, 8)))
    assert torch.equal(torch.get_rng_state(), before)
    assert set(seen) == {False}
    assert module.training
    assert layer.training
