"""What a budget promises: the metric is kept within it, in few evaluations, with little given up, for a reason."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CLASSES, FEATURES, Net, TiedEncoder, keeper, loader, loops_of, trainer
from torch import nn

from tinyq_lightning import QuantizationSpec, TinyQCallback, load_quantized
from tinyq_lightning.errors import EvaluationError, SpecError
from tinyq_lightning.methods import LADDER as ALL_METHODS
from tinyq_lightning.plan.swap import Swap
from tinyq_lightning.search.budget import SearchedLayer, evaluation_limit, search
from tinyq_lightning.spec.spec import Budget

LADDER = ALL_METHODS[3:]  # of eight bits; test_ladder.py has those of four


# The search alone, on layers made up


@st.composite
def worlds(draw):
    """Layers, and how much each of their methods costs the metric; the SQNR may mislead."""
    count = draw(st.integers(1, 40))
    unit = st.floats(0, 1)
    layers, harm = [], {}
    for index in range(count):
        name, sqnr = f"layer{index}", draw(st.floats(-5, 60))
        steps = [draw(unit), draw(unit), draw(unit)] if draw(st.integers(0, 4)) == 0 else [0, 0, 0]
        layers.append(
            SearchedLayer(
                name,
                draw(st.sampled_from(LADDER[:3])),
                draw(st.integers(1, 1000)),
                {method: sqnr + 20 * draw(unit) * at for at, method in enumerate(LADDER[:3])},
            )
        )
        harm[name] = dict(zip(LADDER, [*sorted(steps, reverse=True), 0], strict=True))
    return layers, harm


def run(layers, harm, allowed=0.01, **limits):
    measured = []

    def measure(changes):
        measured.append(changes)
        return 1 - sum(harm[layer.name][changes.get(layer.name, layer.method)] for layer in layers)

    found = search(layers, Budget("acc", "max", allowed, **limits), 1.0, measure({}), measure)
    return found, measured


@given(worlds())
@settings(max_examples=200, deadline=None)
def test_the_search_takes_no_more_evaluations_than_it_states_and_finds_the_same_twice(world):
    found, measured = run(*world)
    assert len(measured) + 2 <= evaluation_limit(len(world[0]))  # the float model and the look at the layers are two
    assert len(found.trials) == len(measured)
    assert run(*world)[0] == found


@given(worlds())
@settings(max_examples=200, deadline=None)
def test_the_search_ends_within_the_budget_where_anything_it_tried_is(world):
    found, _ = run(*world)
    within = [trial for trial in found.trials if trial.lost <= found.allowed]
    assert found.met == bool(within)
    best = min(within, key=lambda trial: trial.extra_bytes) if within else min(found.trials, key=lambda t: t.lost)
    assert found.best.extra_bytes == best.extra_bytes
    assert found.stopped_by is None


def test_evaluation_limit_is_the_formula_of_the_docstring():
    assert evaluation_limit(19) == 14
    assert [evaluation_limit(count) for count in (1, 2, 64)] == [6, 8, 18]


def test_a_layer_climbs_no_further_than_it_needs():
    layers = [SearchedLayer(f"l{i}", "w8a8", 100, {"w8a8": 30 - i, "w8a16": 45, "w8a32": 60}) for i in range(8)]
    harm = {layer.name: dict.fromkeys(LADDER, 0.0) for layer in layers}
    harm["l7"]["w8a8"] = 0.3
    found, _ = run(layers, harm)
    assert found.best.changes == {"l7": "w8a16"}
    harm["l7"]["w8a16"] = 0.2
    found, _ = run(layers, harm)
    assert found.best.changes["l7"] == "w8a32"
    assert found.best.extra_bytes == 0


def test_a_method_that_improves_nothing_is_no_rung():
    assert SearchedLayer("l", "w8a8", 1, {"w8a8": 3.0, "w8a16": 3.1, "w8a32": 3.1}).rungs() == [
        ("w8a8", 3.0),
        ("float", math.inf),
    ]


def test_bytes_are_won_back_where_the_ranking_misled():
    layers = [SearchedLayer(f"l{i}", "w8a32", 100, {"w8a32": float(i)}) for i in range(32)]
    harm = {layer.name: dict.fromkeys(LADDER, 0.0) for layer in layers}
    harm["l9"]["w8a32"] = 0.5
    found, _ = run(layers, harm)
    assert found.best.changes == {"l9": "float"}


@given(worlds())
@settings(max_examples=100, deadline=None)
def test_no_plan_is_measured_twice(world):
    _, measured = run(*world)
    assert all(plan not in measured[:index] for index, plan in enumerate(measured))


@pytest.mark.parametrize("needed", [{2}, {2, 11}, {0, 5, 11}])
def test_only_the_layers_that_are_needed_are_given_up(needed):
    layers = [SearchedLayer(f"l{i}", "w8a32", 100, {"w8a32": float(i)}) for i in range(16)]
    harm = {layer.name: dict.fromkeys(LADDER, 0.0) for layer in layers}
    for index in needed:
        harm[f"l{index}"]["w8a32"] = 0.5
    found, measured = run(layers, harm)
    assert found.met
    assert set(found.best.changes) == {f"l{index}" for index in needed} or len(measured) + 2 == evaluation_limit(16)
    assert len(found.best.changes) <= len(needed) + 3


@pytest.mark.parametrize("value", [math.nan, 0.2])
def test_with_nothing_within_the_budget_the_plan_that_loses_least_wins(value):
    layers = [SearchedLayer(f"l{i}", "w8a8", 100, {}) for i in range(4)]
    budget = Budget("acc", "max", 0.01)
    found = search(layers, budget, 1.0, value, lambda changes: 0.5 if len(changes) == 2 else math.nan)
    assert not found.met
    assert found.best.value == 0.5 if any(len(trial.changes) == 2 for trial in found.trials) else value


# The budget in the YAML and in the arguments


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"max_drop": -0.1}, "max_drop must be"),
        ({"max_drop": math.nan}, "max_drop must be"),
        ({"max_drop": math.inf}, "max_drop must be"),
        ({"max_drop": "-1%"}, "max_drop must be"),
        ({"max_drop": "1.2.3%"}, "max_drop must be"),
        ({"max_drop": "much"}, "max_drop must be"),
        ({"max_drop": True}, "max_drop must be"),
        ({"max_drop": 0.1, "mode": "upward"}, "'upward' is not a mode"),
        ({"max_drop": 0.1, "max_evals": 0}, "max_evals must be"),
        ({"max_drop": 0.1, "max_evals": 1.5}, "max_evals must be"),
        ({"max_drop": 0.1, "max_seconds": -1}, "max_seconds must be"),
        ({"max_drop": 0.1, "max_eval": 3}, "Did you mean 'max_evals'"),
        ({}, "'max_drop' is missing"),
    ],
)
def test_a_wrong_budget_is_refused_when_it_is_given(tmp_path, budget, message):
    with pytest.raises(SpecError, match=message):
        TinyQCallback({"budget": {"monitor": "val_acc", **budget}})
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump({"budget": {"monitor": "val_acc", **budget}}))
    with pytest.raises(SpecError, match=r"spec\.yaml:\d"):
        TinyQCallback(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_drop": 0.1}, "'monitor' is missing"),
        ({"mode": "max"}, "mode belongs to a budget"),
        ({"monitor": "val_acc", "max_drop": -1}, "max_drop must be"),
        ({"monitor": "val_acc", "max_drop": 0.1, "mode": "upward"}, "'upward' is not a mode"),
        ({"monitor": "val_acc", "max_drop": 0.1, "when": "test_start"}, "validation"),
        ({"report": "fully"}, "report must be"),
    ],
)
def test_wrong_arguments_are_refused_when_they_are_given(arguments, message):
    with pytest.raises(SpecError, match=message):
        TinyQCallback("w8a8", **arguments)


def test_arguments_win_over_the_yaml_key_by_key():
    spec = {"method": "w8a8", "budget": {"monitor": "val_acc", "max_drop": "1%", "max_evals": 3}}
    budget = TinyQCallback(spec, max_drop=0.2, mode="min").spec.budget
    assert budget == Budget("val_acc", "min", 0.2, 3)
    assert QuantizationSpec.from_dict(QuantizationSpec.from_dict(spec).to_dict()).budget.max_drop == "1%"


def test_a_share_is_of_the_float_value():
    assert Budget("a", "max", "1%").allowed(-0.5) == pytest.approx(0.005)
    assert Budget("a", "min", "1%").lost(0.5, 0.75) == 0.25


# With a Trainer


class Deep(Net):
    """Nineteen layers. The first feature that each sees is zero: a huge weight for it changes nothing in float."""

    def __init__(self, width: int = 16):
        super().__init__(width)
        del self.body
        self.stem = nn.Linear(FEATURES, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(17))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.stem(self.blind(x))
        for block in self.blocks:
            x = x + 0.2 * nn.functional.gelu(block(self.blind(x)))
        return self.head(self.blind(x))

    @staticmethod
    def blind(x):
        return nn.functional.pad(x[..., 1:], (1, 0))

    def on_validation_epoch_start(self):
        loops_of[type(self).__name__] += 1


def spoiled(root, *names):
    """A trained net in which rows of the named layers hide under one weight of 400, and its checkpoint."""
    module = Deep()
    trainer(root, max_epochs=3, limit_val_batches=0).fit(module, loader(384, shuffle=True), loader(seed=1))
    with torch.no_grad():
        for name in names:
            module.get_submodule(name).weight[:, 0] = 400
    return module


def searched(root, module, callback, **settings):
    loops_of["Deep"] = 0
    run = trainer(root, callback, max_epochs=0, num_sanity_val_steps=0, **settings)
    run.fit(module, loader(shuffle=True), loader(seed=1))
    return run


def test_two_layers_of_nineteen_that_cannot_be_int8_are_found(tmp_path):
    module = spoiled(tmp_path, "stem", "head")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    callback = TinyQCallback("w8a8", weights="current", monitor="val_acc", max_drop=0.01)
    searched(tmp_path, module, callback)
    values = callback.results["val_acc"]
    given_up = {decision.name for decision in callback.plan if decision.method != "w8a8"}
    assert callback.search.trials[0].lost > 0.3
    assert values["float"] - values[callback.plan.label] <= 0.01
    assert {"stem", "head"} <= given_up
    assert len(given_up) <= 6
    assert loops_of["Deep"] <= 14
    for decision in callback.plan:
        if decision.name in given_up:
            assert decision.reason.startswith("budget: output SQNR ")
            assert f"val_acc lost {callback.search.trials[0].lost:.3g}, now loses" in decision.reason
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    # what is saved is what was measured
    reloaded = load_quantized(callback.quantized_path, Deep)
    assert trainer(tmp_path).validate(reloaded, loader(seed=1), verbose=False)[0]["val_acc"] == pytest.approx(
        values[callback.plan.label], abs=1e-6
    )


def test_the_spec_written_back_gives_the_same_bytes_without_a_search(tmp_path):
    module = spoiled(tmp_path, "stem", "head")
    searching = TinyQCallback("w8a8", weights="current", monitor="val_acc", max_drop=0.01)
    searched(tmp_path / "searched", module, searching)
    path = Path(searching.quantized_path).with_suffix(".yaml")
    text = path.read_text()
    assert all(f"#   {decision.name} " in text for decision in searching.plan)
    again = TinyQCallback(path)
    searched(tmp_path / "again", module, again)
    assert again.search is None
    assert loops_of["Deep"] == 2, "the float model and the plan, nothing else"
    assert list(again.plan) == list(searching.plan)
    assert Path(again.quantized_path).read_bytes() == Path(searching.quantized_path).read_bytes()
    report = json.loads(path.with_suffix(".json").read_text())
    assert QuantizationSpec.from_dict(report["spec"]) == QuantizationSpec.from_yaml(path)


def test_a_budget_that_is_met_at_once_costs_no_further_evaluation(tmp_path):
    callback = TinyQCallback("w8a32", weights="current", monitor="val_acc", max_drop="50%", report=False)
    searched(tmp_path, spoiled(tmp_path), callback)
    assert loops_of["Deep"] == 2
    assert callback.plan.label == "w8a32"
    assert callback.search.met


class Slow(Deep):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        time.sleep(0.1)
        return super().validation_step(batch, batch_idx)


@pytest.mark.parametrize(("limit", "loops"), [({"max_evals": 1}, 4), ({"max_seconds": 1}, 2)])
def test_a_search_cut_short_leaves_the_best_file_a_report_and_a_warning(tmp_path, limit, loops):
    module = spoiled(tmp_path, "stem", "head", *(f"blocks.{i}" for i in range(17)))
    module.__class__ = Slow
    budget = {"monitor": "val_acc", "max_drop": 0.0001, **limit}
    callback = TinyQCallback({"method": "w8a8", "weights": "current", "budget": budget})
    run, loops_of["Slow"] = trainer(tmp_path, callback, max_epochs=0, num_sanity_val_steps=0), 0
    with pytest.warns(UserWarning, match=r"budget NOT met: val_acc loses .* more than the 0.0001 allowed") as caught:
        run.fit(module, loader(shuffle=True), loader(seed=1))
    assert loops_of["Slow"] <= loops
    assert f"stopped by {next(iter(limit))}" in "".join(str(warning.message) for warning in caught)
    assert callback.search.best.lost == min(trial.lost for trial in callback.search.trials)
    path = Path(callback.quantized_path)
    report = json.loads(path.with_suffix(".json").read_text())
    assert report["budget"]["met"] is False
    assert report["budget"]["stopped_by"] == next(iter(limit))
    assert "NOT met" in path.with_suffix(".html").read_text()
    assert load_quantized(path, Deep) is not None


def test_the_same_data_give_the_same_plan(tmp_path):
    module = spoiled(tmp_path, "stem", "blocks.3", "blocks.11")
    plans = []
    for name in ("one", "two"):
        callback = TinyQCallback("w8a8", weights="current", monitor="val_loss", mode="min", max_drop=1e-3, report=False)
        searched(tmp_path / name, module, callback)
        plans.append(callback.plan)
    assert plans[0] == plans[1]


def test_lower_is_better_is_told_by_mode_and_a_metric_that_tells_needs_none(tmp_path):
    module = spoiled(tmp_path, "stem")
    callback = TinyQCallback("w8a8", weights="current", monitor="val_loss", mode="min", max_drop=0.05, report=False)
    searched(tmp_path, module, callback)
    values = callback.results["val_loss"]
    assert values[callback.plan.label] - values["float"] <= 0.05
    assert "stem" in callback.search.best.changes


@pytest.mark.parametrize("sanity", [0, 2])
def test_a_plain_value_needs_a_mode_and_that_is_said_after_the_first_validation(tmp_path, sanity):
    module = Net()
    callback = TinyQCallback("w8a8", monitor="val_loss", max_drop=0.1)
    run = trainer(tmp_path, callback, max_epochs=50, num_sanity_val_steps=sanity)
    with pytest.raises(SpecError, match="mode is needed, since 'val_loss'"):
        run.fit(module, loader(), loader(seed=1))
    assert run.current_epoch == 0
    assert run.global_step == (0 if sanity else 6)


def test_a_metric_that_is_not_logged_is_named_before_training_with_those_that_are(tmp_path):
    run = trainer(tmp_path, TinyQCallback("w8a8", monitor="val_ac", max_drop=0.1))
    with pytest.raises(SpecError, match=r"no metric 'val_ac'. Did you mean 'val_acc'\? It logs: val_acc, val_f1"):
        run.fit(Net(), loader(), loader(seed=1))
    assert run.global_step == 0


class LogsLater(Net):
    """Logs nothing, or but the loss, in the sanity check."""

    def __init__(self, in_sanity_check=()):
        super().__init__()
        self.in_sanity_check = in_sanity_check

    def log(self, name, *args, **kwargs):
        if not self.trainer.sanity_checking or name in self.in_sanity_check:
            super().log(name, *args, **kwargs)

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.val_acc(logits, batch[1])
        self.log("val_acc", self.val_acc)
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))


def test_a_sanity_check_in_which_nothing_is_logged_refuses_nothing(tmp_path):
    callback = TinyQCallback("w8a8", monitor="val_acc", max_drop=0.1, report=False)
    trainer(tmp_path, keeper(tmp_path), callback).fit(LogsLater(), loader(), loader(seed=1))
    assert callback.search.met


def test_a_metric_that_the_sanity_check_lacks_is_refused_with_the_cure(tmp_path):
    def run(**settings):
        callback = TinyQCallback("w8a8", monitor="val_acc", max_drop=0.1, report=False)
        trainer(tmp_path, keeper(tmp_path), callback, **settings).fit(
            LogsLater(in_sanity_check=["val_loss"]), loader(), loader(seed=1)
        )
        return callback

    with pytest.raises(SpecError, match=r"It logs: val_loss\. This was the sanity check.*num_sanity_val_steps=0"):
        run()
    assert run(num_sanity_val_steps=0).search.met


def test_without_a_sanity_check_a_metric_that_is_not_logged_leaves_the_training_safe(tmp_path):
    callback = TinyQCallback("w8a8", monitor="val_ac", max_drop=0.1)
    run = trainer(tmp_path, keeper(tmp_path), callback, num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match=r"(?s)no metric 'val_ac'.*results are safe; the float checkpoint is"):
        run.fit(Net(), loader(), loader(seed=1))
    assert isinstance(callback.error, SpecError)
    assert Path(callback.float_path).exists()
    assert not list(tmp_path.glob("w8a8*"))


def test_without_a_validation_loop_a_budget_is_refused_before_training(tmp_path):
    run = trainer(tmp_path, TinyQCallback("w8a8", monitor="val_acc", max_drop=0.1), limit_val_batches=0)
    with pytest.raises(EvaluationError, match="limit_val_batches is 0"):
        run.fit(Net(), loader(), loader(seed=1))
    assert run.global_step == 0


def test_a_float_metric_that_is_not_a_number_is_refused(tmp_path):
    class Nan(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_nan", torch.tensor(math.nan))

    run = trainer(tmp_path, TinyQCallback("w8a8", monitor="val_nan", mode="max", max_drop=0.1, strict=True))
    with pytest.raises(EvaluationError, match="float model's val_nan is nan"):
        run.fit(Nan(), loader(), loader(seed=1))


def test_other_runs_of_the_trainer_ask_nothing_of_the_budget(tmp_path):
    callback = TinyQCallback("w8a8", monitor="val_loss", max_drop=0.1)
    assert trainer(tmp_path, callback).validate(Net(), loader(seed=1), verbose=False)


class Tied(TiedEncoder):
    """Blind in the first feature, as `Deep` is."""

    depth = 2

    def forward(self, x):
        tokens = Deep.blind(self.embed.weight * x[..., None])
        return self.head(self.out(Deep.blind(self.encoder(tokens).mean(1))))


def test_attention_and_tied_layers_are_searched_and_stay_tied(tmp_path):
    module = Tied()
    trainer(tmp_path, max_epochs=4, limit_val_batches=0).fit(module, loader(384, shuffle=True), loader(seed=1))
    with torch.no_grad():  # for features that are always zero
        module.out.weight[:, 0] = 400
        module.encoder.layers[0].self_attn.in_proj_weight[:, 0] = 400
    callback = TinyQCallback("w8a8", weights="current", monitor="val_loss", mode="min", max_drop=1e-3, report="full")
    trainer(tmp_path, callback, max_epochs=0).fit(module, loader(), loader(seed=1))
    report = json.loads(Path(callback.quantized_path).with_suffix(".json").read_text())
    linears = [layer for layer in report["layers"] if layer["name"] != "embed"]
    assert all(layer["output_sqnr_db"] for layer in linears), "attention's projections are measured too"
    methods = {decision.name: decision.method for decision in callback.plan}
    given_up = {name for name, method in methods.items() if method == "float"}
    assert given_up == {"embed", "out", "encoder.layers.0.self_attn.in_proj"}
    assert next(d.reason for d in callback.plan if d.name == "embed").startswith("tied to out.weight (budget: output")
    again = TinyQCallback(Path(callback.quantized_path).with_suffix(".yaml"))
    trainer(tmp_path / "again", again, max_epochs=0).fit(module, loader(), loader(seed=1))
    assert list(again.plan) == list(callback.plan)
    assert Path(again.quantized_path).read_bytes() == Path(callback.quantized_path).read_bytes()


@pytest.mark.parametrize("rules", [[], [{"match": "embed", "method": "w8a32"}]])
@pytest.mark.parametrize("method", ["w8a16", "float"])
def test_a_tied_embedding_is_after_a_search_as_the_written_spec_has_it(method, rules):
    module = Tied()
    spec = QuantizationSpec.from_dict({"method": "w8a8", "rules": rules})
    switched = Swap(module, spec).switched({"out": (method, "budget: costs 0.1")}, "budget")
    assert list(Swap(module, switched.plan.to_spec()).plan) == list(switched.plan)
    with switched:
        assert (type(module.out) is nn.Linear) == (type(module.embed) is nn.Embedding) == (method == "float")


@pytest.mark.parametrize("method", ["w8a16", "float"])
def test_an_embedding_of_two_tied_layers_is_after_a_search_as_the_written_spec_has_it(method):
    module = nn.ModuleDict({"embed": nn.Embedding(20, 16), "first": nn.Linear(16, 20), "second": nn.Linear(16, 20)})
    module["first"].weight = module["second"].weight = module["embed"].weight
    switched = Swap(module, QuantizationSpec("w8a8")).switched({"second": (method, "budget: costs 0.1")}, "budget")
    assert list(Swap(module, switched.plan.to_spec()).plan) == list(switched.plan)
