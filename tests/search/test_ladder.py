"""The ladder of a budget: from four bits up by bytes, on the rungs that a spec allows, in few evaluations."""

from __future__ import annotations

import math

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Net, keeper, loader, trainer

from tinyq_lightning import QuantizationSpec, TinyQCallback, load_quantized
from tinyq_lightning.errors import SpecError
from tinyq_lightning.methods import LADDER, METHODS
from tinyq_lightning.plan.swap import Swap
from tinyq_lightning.search.budget import SearchedLayer, evaluation_limit, search
from tinyq_lightning.spec.parts import Budget
from tinyq_lightning.spec.spec import as_spec
from tinyq_lightning.trainer.searched import searched_layers

BUDGET = {"monitor": "val_acc", "mode": "max", "max_drop": 0.005}


def layer(name, method="w4a8", weights=1000, sqnr=20.0, barred=()):
    """With errors that come from its weights for the most part."""
    of_bits = {4: sqnr, 8: sqnr + 20}
    db = {each: of_bits[METHODS[each].bits] + (0.5 if "a8" not in each else 0) for each in LADDER[:-1]}
    more = {each: weights // 2 for each in LADDER[:-1] if METHODS[each].bits == 8 > METHODS[method].bits}
    own = weights * METHODS[method].bits // 8
    return SearchedLayer(name, method, 4 * weights - own, db, frozenset(barred), more)


def run(layers, harm, allowed=0.01):
    measured = []

    def measure(changes):
        measured.append(changes)
        return 1 - sum(harm(each.name, changes.get(each.name, each.method)) for each in layers)

    found = search(layers, Budget("acc", "max", allowed), 1.0, measure({}), measure)
    return found, measured


@given(st.integers(1, 40), st.integers(0, 2**16), st.sampled_from(LADDER[:6]))
@settings(max_examples=100, deadline=None)
def test_from_four_bits_too_the_search_takes_no_more_evaluations_than_it_states(count, seed, method):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(count, len(LADDER), generator=generator).sort(1, descending=True).values / count
    layers = [layer(f"l{i}", method, 100 + 37 * i, 10 + i % 7) for i in range(count)]
    found, measured = run(layers, lambda name, by: cost[int(name[1:]), LADDER.index(by)].item() * (by != "float"))
    assert len(measured) + 2 <= evaluation_limit(count)
    within = [trial for trial in found.trials if trial.lost <= found.allowed]
    if within:
        assert found.best.extra_bytes == min(trial.extra_bytes for trial in within)


def test_a_layer_climbs_from_four_bits_to_eight_before_it_is_left_float():
    layers = [layer(f"l{i}", "w4a32") for i in range(8)]
    found, _ = run(layers, lambda name, by: 0.3 * (name == "l3" and by == "w4a32"))
    assert [*found.best.changes] == ["l3"]
    assert METHODS[found.best.changes["l3"]].bits == 8
    assert found.best.extra_bytes == 500


def test_what_costs_the_fewest_bytes_for_its_error_climbs_first():
    large, small = layer("large", weights=100_000, sqnr=20), layer("small", weights=1000, sqnr=21)
    found, _ = run([large, small], lambda name, by: 0.3 * (METHODS[by].bits == 4 if by != "float" else 0), 0.35)
    assert found.met
    assert {*found.best.changes} == {"small"}


def test_methods_that_improve_nothing_are_no_rungs():
    assert [method for method, _ in layer("l").rungs()] == ["w4a8", "w8a8", "float"]
    assert [method for method, _ in layer("l", barred=["w8a8", "w8a16"]).rungs()] == ["w4a8", "w8a32", "float"]
    assert [method for method, _ in layer("l", barred=["float"]).rungs()] == ["w4a8", "w8a8"]


def test_without_float_on_the_ladder_every_layer_may_climb_to_its_end():
    layers = [layer(f"l{i}", "w4a32", barred=["float"]) for i in range(4)]
    found, _ = run(layers, lambda name, by: 0.3 * (METHODS[by].bits == 4))
    assert found.met
    assert {METHODS[method].bits for method in found.best.changes.values()} == {8}
    assert len(found.best.changes) == 4


def test_searched_layers_know_their_bytes_by_each_method_and_the_rungs_of_the_ladder():
    model = Net(32)
    swap = Swap(model, as_spec("w4a32"))
    budget = as_spec({"budget": {**BUDGET, "ladder": ["w4a32", "w8a32", "float"]}}).budget
    layers = searched_layers(swap, {}, {}, budget)
    assert [[method for method, _ in each.rungs()] for each in layers] == [["w4a32", "w8a32", "float"]] * 3
    measured = searched_layers(swap, {}, {}, Budget("val_acc", "max", 0.1))
    for each in measured:
        eight = next(decision for decision in Swap(model, as_spec("w8a8")).plan if decision.name == each.name)
        four = next(decision for decision in swap.plan if decision.name == each.name)
        assert each.added("w8a8") == eight.bytes - four.bytes
        assert each.added("float") == four.float_bytes - four.bytes


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"ladder": ["w8a32", "w4a32"]}, "w4a32 stands after w8a32: a ladder goes up, as w4a8 → w4a16"),
        ({"ladder": ["w4a32", "w4a32"]}, "w4a32 stands after w4a32"),
        ({"ladder": ["w4a33", "float"]}, "Did you mean 'w4a32'"),
        ({"ladder": []}, "a ladder begins with a method that is not float"),
        ({"ladder": ["float"]}, "a ladder begins with a method that is not float"),
        ({"ladder": "w4a32"}, "ladder must be a list"),
        (
            {"method": "w8a8", "ladder": ["w4a32", "float"]},
            "the ladder w4a32, float lacks w8a8, the method",
        ),
    ],
)
def test_a_wrong_ladder_is_refused_with_its_place(tmp_path, spec, message):
    content = {name: spec[name] for name in ("method",) if name in spec}
    content["budget"] = {**BUDGET, "ladder": spec["ladder"]}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(SpecError, match=rf"spec\.yaml:\d .*{message}"):
        QuantizationSpec.from_yaml(tmp_path / "spec.yaml")


def test_a_ladder_is_written_back_and_gives_the_method_that_is_not_said(tmp_path):
    spec = as_spec({"budget": {**BUDGET, "ladder": ["w4a32", "w8a32", "float"]}})
    assert spec.method == "w4a32"
    assert as_spec(spec.to_dict()) == spec
    spec.to_yaml(tmp_path / "spec.yaml")
    assert QuantizationSpec.from_yaml(tmp_path / "spec.yaml") == spec
    assert "ladder" not in as_spec({"budget": BUDGET}).to_dict()["budget"]


class Sensitive(Net):
    """A head in which a few large weights leave four bits too coarse for the others."""

    def __init__(self, width=32, lr=0.02):
        super().__init__(width, lr)
        with torch.no_grad():
            self.head.weight[:, ::5] *= 40


@pytest.mark.parametrize("ladder", [None, ["w4a32", "w8a32", "float"]])
def test_a_run_ends_smaller_than_eight_bits_everywhere_within_the_budget(tmp_path, ladder):
    torch.manual_seed(0)
    budget = {**BUDGET, **({} if ladder is None else {"ladder": ladder})}
    callback = TinyQCallback({"method": "w4a32", "budget": budget}, report=False)
    trainer(tmp_path, keeper(tmp_path), callback, max_epochs=2).fit(Sensitive(), loader(shuffle=True), loader(seed=1))
    assert callback.error is None
    found = {decision.name: decision for decision in callback.plan}
    assert found["body.2"].method == "w4a32"
    floats = callback.results["val_acc"]["float"]
    assert callback.results["val_acc"][callback.plan.label] >= floats - 0.005
    eight = Swap(Sensitive(), as_spec("w8a32")).plan
    assert sum(each.bytes for each in callback.plan) < sum(each.bytes for each in eight)
    if ladder:
        assert {each.method for each in callback.plan} <= set(ladder)
    assert math.isfinite(load_quantized(callback.quantized_path, Sensitive)(torch.ones(1, 8)).sum())


def test_the_smallest_of_four_and_eight_bits_is_kept(tmp_path):
    torch.manual_seed(0)
    spec = {"method": ["w8a32", "w4a32"], "budget": {**BUDGET, "max_drop": 0.2}, "keep": "smallest"}
    callback = TinyQCallback(spec, report=False)
    trainer(tmp_path, keeper(tmp_path), callback, max_epochs=2).fit(Net(), loader(shuffle=True), loader(seed=1))
    assert [*callback.quantized_paths] == ["w4a32"]
    assert "w8a32" in callback.plans
