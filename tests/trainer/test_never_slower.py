"""What ``never_slower`` promises: layers that int8 makes slower stay float, and nothing is timed unless asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import CLASSES, FEATURES, Net, NetOfHooks, TiedEncoder, keeper, loader, loops_of, trainer
from ranks import run_on_ranks, written_by_ranks
from torch import nn

from tinyq_lightning import QuantizationSpec, TinyQCallback, load_quantized, quantize, quantized
from tinyq_lightning.command.cli import main
from tinyq_lightning.errors import EvaluationError, SpecError
from tinyq_lightning.plan.swap import Swap
from tinyq_lightning.search.budget import SearchedLayer


class Loops(Net):
    """Counts its validation loops. ``body.0`` is [16, 8], ``body.2`` [16, 16], ``head`` [4, 16]."""

    def on_validation_epoch_start(self):
        loops_of[type(self).__name__] += 1


@pytest.fixture
def timer(monkeypatch):
    """In the place of the timer: int8 milliseconds by (out_features, method) or out_features, float takes 1."""
    told, asked = {}, []

    def time_call(layers, call):
        layer = layers[0][1]
        asked.append((layer.in_features, layer.out_features, layer.method, call.rows))
        return 1.0, told.get((layer.out_features, layer.method), told.get(layer.out_features, 0.5))

    monkeypatch.setattr("tinyq_lightning.search.timing.time_call", time_call)
    told["asked"] = asked
    return told


@pytest.fixture
def no_timer(monkeypatch):
    def time_call(layers, call):
        raise AssertionError("nothing is to be timed")

    monkeypatch.setattr("tinyq_lightning.search.timing.time_call", time_call)


def fit(root, callback, module=None, **settings):
    module = module or Loops()
    loops_of["Loops"] = 0
    run = trainer(root, callback, max_epochs=0, num_sanity_val_steps=0, **settings)
    run.fit(module, loader(shuffle=True), loader(seed=1, count=200))
    return module


def methods_of(plan):
    return {decision.name: decision.method for decision in plan}


def report_of(path):
    return json.loads(Path(path).with_suffix(".json").read_text())


# After a fit


def test_a_layer_that_loses_is_left_float_with_the_measured_ratio_as_the_reason(tmp_path, timer, capsys):
    timer[CLASSES] = 1.31
    callback = TinyQCallback("w8a32", weights="current", never_slower=True)
    module = fit(tmp_path, callback)
    assert methods_of(callback.plan) == {"body.0": "w8a32", "body.2": "w8a32", "head": "float"}
    reasons = [decision.reason for decision in callback.plan]
    assert reasons == ["spec"] * 2 + [
        # 200 samples in batches of 32
        "left float: quantized, it took 1.31x the time of float at 8 to 32 rows, measured here"
    ]
    assert loops_of["Loops"] == 2, "the float model and the plan, nothing else"
    assert timer["asked"] == [
        (FEATURES, 16, "w8a32", 32),
        (FEATURES, 16, "w8a32", 8),
        (16, 16, "w8a32", 32),
        (16, 16, "w8a32", 8),
        (16, CLASSES, "w8a32", 32),
        (16, CLASSES, "w8a32", 8),
    ]
    assert "never slower: 1 of 3 layers left float (6 timings took " in capsys.readouterr().out
    # what is saved is what was measured
    values = callback.results["val_loss"]
    reloaded = load_quantized(callback.quantized_path, Loops)
    assert torch.equal(reloaded.head.weight, module.head.weight)
    again = trainer(tmp_path).validate(reloaded, loader(seed=1, count=200), verbose=False)[0]
    assert again["val_loss"] == pytest.approx(values["w8a32"], abs=1e-6)


def test_the_timings_lie_beside_the_plan_and_in_no_checkpoint(tmp_path, timer):
    timer[CLASSES] = 2.0
    callback = TinyQCallback("w8a32", weights="current", never_slower=True)
    fit(tmp_path, callback)
    found = report_of(callback.quantized_path)["never_slower"]
    assert found["threads"] == torch.get_num_threads()
    assert found["seconds"] >= 0
    assert [timing["ms"] for timing in found["timings"]] == [0.5, 0.5, 0.5, 0.5, 2.0, 2.0]
    assert found["timings"][0] == {
        "kind": "linear",
        "layer": f"in_features={FEATURES}, out_features=16, bias=True, dtype=torch.float32",
        "method": "w8a32",
        "dtype": "float32",
        "input": {"rows": 32, "dtype": "float32", "autocast": None, "device": "cpu", "part": None, "sizes": []},
        "float_ms": 1.0,
        "ms": 0.5,
    }
    assert "never slower: 1 of 3" in Path(callback.quantized_path).with_suffix(".html").read_text().lower()
    assert "never_slower" not in str(torch.load(callback.quantized_path, weights_only=True)["tinyq"])


def again_without_timing(callback, root, monkeypatch, **fitted):
    """The callback of a run by the YAML that another has left, in which nothing may be timed."""

    def time_call(layers, call):
        raise AssertionError("nothing is to be timed")

    monkeypatch.setattr("tinyq_lightning.search.timing.time_call", time_call)
    again = TinyQCallback(Path(callback.quantized_path).with_suffix(".yaml"))
    fit(root, again, **fitted)
    return again


def test_the_spec_written_back_gives_the_same_bytes_without_timing(tmp_path, timer, monkeypatch):
    timer[16] = 1.7
    callback = TinyQCallback("w8a8", weights="current", never_slower=True)
    module = fit(tmp_path / "timed", callback)
    path = Path(callback.quantized_path).with_suffix(".yaml")
    spec = QuantizationSpec.from_yaml(path)
    assert not spec.never_slower
    assert [(rule.match, rule.method) for rule in spec.rules] == [(r"re:body\.0", "float"), (r"re:body\.2", "float")]
    assert all(rule.reason.startswith("left float: quantized, it took 1.70x") for rule in spec.rules)
    again = again_without_timing(callback, tmp_path / "again", monkeypatch, module=module)
    assert list(again.plan) == list(callback.plan)
    assert Path(again.quantized_path).read_bytes() == Path(callback.quantized_path).read_bytes()
    quantize(module, path)
    assert isinstance(module.body[0], nn.Linear), "and it is good without a run"


@pytest.mark.usefixtures("no_timer")
def test_without_never_slower_nothing_is_timed_and_no_file_tells_of_it(tmp_path):
    callback = TinyQCallback("w8a32", weights="current", never_slower=False)
    fit(tmp_path, callback)
    assert set(methods_of(callback.plan).values()) == {"w8a32"}
    assert report_of(callback.quantized_path)["never_slower"] is None
    for file in tmp_path.glob("w8a32-*.[cy]*"):
        assert b"never_slower" not in file.read_bytes()


def test_a_real_timer_decides_every_layer_one_way_or_the_other(tmp_path):
    callback = TinyQCallback("w8a8", weights="current", never_slower=True, exclude=["body.0"])
    with pytest.MonkeyPatch.context() as patch:  # whether any layer stays int8 is this machine's to say
        patch.setattr("tinyq_lightning.callback.rank_zero_warn", lambda *_: None)
        fit(tmp_path, callback)
    found = report_of(callback.quantized_path)["never_slower"]
    timed = {(timing["layer"].split(", ")[1], timing["input"]["rows"]) for timing in found["timings"]}
    assert timed == {(f"out_features={out}", rows) for out in (16, CLASSES) for rows in (8, 32)}
    assert all(timing["float_ms"] > 0 and timing["ms"] > 0 for timing in found["timings"])
    reasons = {decision.name: (decision.method, decision.reason.split(":")[0]) for decision in callback.plan}
    assert reasons.pop("body.0") == ("float", "excluded")
    assert set(reasons.values()) <= {("w8a8", "spec"), ("float", "left float")}
    assert load_quantized(callback.quantized_path, Loops)


def test_where_all_layers_lose_the_file_holds_floats_and_a_warning_says_so(tmp_path, timer, monkeypatch):
    timer |= {16: 3.0, CLASSES: 3.0}
    callback = TinyQCallback("w8a32", weights="current", never_slower=True)
    with pytest.warns(UserWarning, match="every layer is slower quantized than as float here"):
        module = fit(tmp_path, callback)
    assert set(methods_of(callback.plan).values()) == {"float"}
    assert Path(callback.quantized_path).name.startswith("float-"), "it is named by what it holds"
    assert all(set(values) == {"float", "all_float", "delta"} for values in callback.results.values())
    reloaded = load_quantized(callback.quantized_path, Loops)
    assert all(torch.equal(value, reloaded.state_dict()[name]) for name, value in module.state_dict().items())
    again = again_without_timing(callback, tmp_path / "again", monkeypatch, module=module)
    assert Path(again.quantized_path).read_bytes() == Path(callback.quantized_path).read_bytes()


def test_each_method_is_decided_for_itself_and_measured_once(tmp_path, timer):
    timer |= {(16, "w8a32"): 2.0, (CLASSES, "w8a8"): 2.0}
    callback = TinyQCallback(["w8a32", "w8a8"], weights="current", never_slower=True)
    fit(tmp_path, callback)
    assert methods_of(callback.plans["w8a32"]) == {"body.0": "float", "body.2": "float", "head": "w8a32"}
    assert methods_of(callback.plans["w8a8"]) == {"body.0": "w8a8", "body.2": "w8a8", "head": "float"}
    assert loops_of["Loops"] == 3
    assert len(timer["asked"]) == len(set(timer["asked"])) == 12


def test_the_yaml_key_and_the_argument_ask_for_the_same(tmp_path, timer):
    timer[CLASSES] = 2.0
    path = tmp_path / "spec.yaml"
    path.write_text("method: w8a32\nweights: current\nnever_slower: true\n")
    assert QuantizationSpec.from_yaml(path) == QuantizationSpec.from_dict(QuantizationSpec.from_yaml(path).to_dict())
    callback = TinyQCallback(str(path), report=False)
    fit(tmp_path, callback)
    assert methods_of(callback.plan)["head"] == "float"
    assert not TinyQCallback(str(path), never_slower=False).spec.never_slower


# Attention and ties


class Encoder(TiedEncoder, Loops):
    """Counts its validation loops too."""


def test_projections_of_attention_and_ties_are_decided_and_written_back(tmp_path, timer, monkeypatch):
    timer |= {48: 2.0, 32: 2.0, FEATURES: 2.0}  # in_proj, linear1, out
    callback = TinyQCallback("w8a8", weights="current", never_slower=True)
    module = fit(tmp_path / "timed", callback, Encoder())
    left = {name for name, method in methods_of(callback.plan).items() if method == "float"}
    layer = "encoder.layers.0"
    assert left == {f"{layer}.self_attn.in_proj", f"{layer}.linear1", "embed", "out"}
    assert (16, 48, "w8a8", 32 * FEATURES) in timer["asked"]
    reason = next(decision.reason for decision in callback.plan if decision.name == "embed")
    assert reason.startswith("tied to out.weight (left float: quantized, it took 2.00x")
    again = again_without_timing(callback, tmp_path / "again", monkeypatch, module=module)
    assert list(again.plan) == list(callback.plan)
    assert Path(again.quantized_path).read_bytes() == Path(callback.quantized_path).read_bytes()
    assert again.results == callback.results, "the float model has been measured as it runs without us"


@pytest.mark.parametrize(("ms", "loops"), [(0.5, 2), (2.0, 3)])
def test_fused_attention_costs_a_further_loop_only_where_something_is_left_float(tmp_path, timer, ms, loops):
    timer[48], loops_of["Encoder"] = ms, 0
    callback = TinyQCallback("w8a8", weights="current", never_slower=True, report=False)
    fit(tmp_path, callback, Encoder())
    assert loops_of["Encoder"] == loops


def test_compiled_layers_whose_calls_hooks_do_not_see_are_counted_once_they_are_quantized(tmp_path, timer):
    class Compiled(Loops):
        def __init__(self):
            super().__init__()
            self.body = torch.compile(self.body, backend="eager")

    module, loops_of["Compiled"] = Compiled(), 0
    before = trainer(tmp_path, inference_mode=False)
    before.validate(module, loader(seed=1, count=200), verbose=False)  # compiles it, without our hooks
    timer[16], loops_of["Compiled"] = 2.0, 0
    callback = TinyQCallback("w8a8", weights="current", never_slower=True, report=False)
    fit(tmp_path, callback, module)
    assert methods_of(callback.plan) == {"body.0": "float", "body.2": "float", "head": "w8a8"}
    assert loops_of["Compiled"] in (2, 3), "the third where torch runs the former graph, which knows no hooks"


def test_two_linears_that_share_a_weight_are_left_float_together(tmp_path, timer):
    class Shared(Loops):
        def __init__(self):
            super().__init__()
            self.body[0] = nn.Linear(FEATURES, 16)
            self.twin = nn.Linear(16, 16, bias=False)
            self.twin.weight = self.body[2].weight

        def forward(self, x):
            return self.head(self.twin(self.body(x)))

    timer[16] = 2.0
    callback = TinyQCallback("w8a8", weights="current", never_slower=True, report=False)
    fit(tmp_path, callback, Shared())
    methods = methods_of(callback.plan)
    assert methods["twin"] == methods["body.2"] == "float"
    assert methods["head"] == "w8a8"


# With a budget


def test_a_search_begins_from_what_is_left_and_tries_no_method_that_is_slower(tmp_path, timer):
    module = Loops()
    with torch.no_grad():
        module.head.weight[:, 0] = 400
        module.body[2].bias[0] = -1e6  # a unit that is always off, so that the huge weight changes nothing in float
    timer |= {(FEATURES, "w8a8"): 2.0, (CLASSES, "w8a16"): 2.0, (CLASSES, "w8a32"): 2.0}
    timer |= {(16, method): 0.5 for method in ("w8a8", "w8a16", "w8a32")}
    callback = TinyQCallback(
        "w8a8", weights="current", never_slower=True, monitor="val_loss", mode="min", max_drop=1e-9, report=False
    )
    fit(tmp_path, callback, module)
    assert len(callback.search.trials) > 1
    tried = {trial.changes["head"] for trial in callback.search.trials if "head" in trial.changes}
    assert tried == {"float"}
    assert {method for _, out, method, _ in timer["asked"] if out == CLASSES} == {"w8a8", "w8a16", "w8a32"}
    assert len(timer["asked"]) == len(set(timer["asked"]))


def test_layers_left_float_are_none_of_the_searchs(tmp_path, timer):
    timer[CLASSES] = 2.0
    callback = TinyQCallback(
        "w8a8", weights="current", never_slower=True, monitor="val_loss", mode="min", max_drop=1e-9, report=False
    )
    with pytest.MonkeyPatch.context() as patch:  # met or not is not the point
        patch.setattr("tinyq_lightning.callback.rank_zero_warn", lambda *_: None)
        fit(tmp_path, callback)
    assert all("head" not in trial.changes for trial in callback.search.trials)
    assert next(d.reason for d in callback.plan if d.name == "head").startswith("left float: quantized, it took 2.00x")


def test_a_method_that_is_too_slow_is_no_rung():
    sqnr = {"w8a8": 10.0, "w8a16": 30.0, "w8a32": 50.0}
    assert [method for method, _ in SearchedLayer("a", "w8a8", 1, sqnr, frozenset({"w8a16"})).rungs()] == [
        "w8a8",
        "w8a32",
        "float",
    ]


# In a test run


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1, "persistent_workers": True}], ids=["inline", "persistent"])
@pytest.mark.parametrize("kind", [Net, NetOfHooks])
def test_the_first_batch_of_a_test_decides_and_leaves_no_trace(tmp_path, timer, monkeypatch, kind, workers):
    timer[CLASSES] = 1.31
    run = trainer(tmp_path, keeper(tmp_path))
    run.fit(kind(), loader(shuffle=True), loader(seed=1))
    path, data = run.checkpoint_callback.best_model_path, loader(seed=2, **workers)

    def tested(callback):
        module = kind()
        trainer(tmp_path, callback).test(module, data, ckpt_path=path, verbose=False, weights_only=True)
        return module

    callback = TinyQCallback("w8a8", when="test_start", never_slower=True, report="full")
    module = tested(callback)
    assert methods_of(callback.plan) == {"body.0": "w8a8", "body.2": "w8a8", "head": "float"}
    assert "1.31x the time of float at 32 rows" in list(callback.plan)[-1].reason
    monkeypatch.setattr("tinyq_lightning.search.timing.time_call", None)
    again = TinyQCallback(Path(callback.quantized_path).with_suffix(".yaml"))
    other = tested(again)
    assert again.results == callback.results
    assert Path(again.quantized_path).read_bytes() == Path(callback.quantized_path).read_bytes()
    assert getattr(module, "batches", None) == getattr(other, "batches", None)
    assert not any(each._forward_pre_hooks or "forward_rows" in vars(each) for each in module.modules())


def test_several_methods_and_callbacks_of_a_test_decide_each_for_themselves(tmp_path, timer):
    timer |= {(16, "w8a32"): 2.0, (CLASSES, "w8a8"): 2.0}
    plain = TinyQCallback("w8a16", when="test_start", report=False)
    timed = TinyQCallback(["w8a32", "w8a8"], when="test_start", never_slower=True, report=False)
    module = Net()
    trainer(tmp_path, plain, timed).test(module, loader(seed=2), verbose=False)
    assert set(methods_of(plain.plan).values()) == {"w8a16"}
    expected = {
        "w8a32": {"body.0": "float", "body.2": "float", "head": "w8a32"},
        "w8a8": {"body.0": "w8a8", "body.2": "w8a8", "head": "float"},
    }
    for method, plan in timed.plans.items():
        assert methods_of(plan) == expected[method]
        alone = trainer(tmp_path).test(
            load_quantized(timed.quantized_paths[method], Net), loader(seed=2), verbose=False
        )
        assert timed.results["test_loss"][method] == pytest.approx(alone[0]["test_loss"], abs=1e-6)
    assert len(timer["asked"]) == len(set(timer["asked"])) == 6


def test_the_test_run_draws_the_random_numbers_it_would_without(tmp_path, timer):
    timer[CLASSES] = 2.0

    class Draws(Net):
        def test_step(self, batch, batch_idx):
            super().test_step(batch, batch_idx)
            self.log("test_draw", torch.rand(()))

    drawn = []
    for asked in (False, True):
        torch.manual_seed(3)
        callback = TinyQCallback("w8a32", when="test_start", never_slower=asked, report=False, save=False)
        trainer(tmp_path, callback).test(Draws(), loader(seed=2), verbose=False)
        drawn.append((callback.results["test_draw"], torch.rand(3).tolist()))
    assert drawn[0] == drawn[1]


# What is refused


def test_it_takes_an_evaluation_and_says_so_before_training(tmp_path):
    with pytest.raises(EvaluationError, match="row counts of the validation loop, but limit_val_batches is 0"):
        fit(tmp_path, TinyQCallback("w8a32", never_slower=True), limit_val_batches=0)


@pytest.mark.parametrize("ask", [quantize, lambda *given: quantized(*given).__enter__(), Swap])
def test_without_a_run_it_is_refused_with_the_way_to_go(ask, tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("method: w8a32\nnever_slower: true\n")
    model = Net()
    with pytest.raises(
        SpecError, match=r"spec.yaml:2 \(never_slower\): .* Give never_slower to TinyQCallback; the YAML"
    ):
        ask(model, QuantizationSpec.from_yaml(path))
    assert isinstance(model.head, nn.Linear)


def test_the_command_line_refuses_it_as_well(tmp_path, fitted, capsys):
    spec, output = tmp_path / "spec.yaml", tmp_path / "q.ckpt"
    spec.write_text("never_slower: true\n")
    given = ["quantize", fitted[0].float_path, "--model", "models:Net", "--spec", str(spec), "--output", str(output)]
    assert main(given) == 1
    assert "Give never_slower to TinyQCallback" in capsys.readouterr().err
    assert not output.exists()


def test_a_value_that_is_neither_true_nor_false_is_refused():
    with pytest.raises(SpecError, match="never_slower must be true or false, not 'yes'"):
        TinyQCallback({"never_slower": "yes"})
    with pytest.raises(SpecError, match=r"unknown key 'never_slow'. Did you mean 'never_slower'"):
        TinyQCallback({"never_slow": True})


# On several processes


@pytest.mark.slow
def test_all_ranks_take_the_plan_of_rank_0(tmp_path):
    run_on_ranks("ddp_never_slower.py", tmp_path)
    for stage in ("fit", "test"):
        ranks = written_by_ranks(tmp_path, stage)
        assert ranks[0]["plan"] == ranks[1]["plan"]
        assert ranks[0]["results"] == ranks[1]["results"]
        assert [decision["method"] for decision in ranks[0]["plan"]] == ["w8a32", "w8a32", "float"]
        assert (ranks[0]["timed"] > 0, ranks[1]["timed"]) == (True, 0), "rank 0 times, and it alone"
