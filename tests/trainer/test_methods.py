"""Several methods in one run: the float model measured once, each method once, a file for each, one table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from models import Net, keeper, loader, loops_of, trainer

from tinyq_lightning import QuantizationSpec, TinyQCallback, load_quantized, quantize
from tinyq_lightning.errors import SpecError

METHODS = ["w8a32", "w8a16", "w8a8"]


class Counts(Net):
    def on_validation_epoch_start(self):
        loops_of[type(self).__name__] += 1


def fit(root, callback):
    run = trainer(root, keeper(root), callback, num_sanity_val_steps=0)
    run.fit(Counts(), loader(shuffle=True), loader(seed=1))
    return run


def test_float_is_measured_once_and_each_method_once(tmp_path):
    callback = TinyQCallback(METHODS, report=False)
    run = trainer(tmp_path, keeper(tmp_path), callback, num_sanity_val_steps=0)
    loops_of["Counts"] = 0
    run.fit(Counts(), loader(shuffle=True), loader(seed=1))
    assert loops_of["Counts"] == 2 + 1 + 3, "two epochs, the float model, three methods"
    assert list(callback.quantized_paths) == list(callback.plans) == METHODS
    assert callback.quantized_path == callback.quantized_paths["w8a32"]
    assert callback.plan is callback.plans["w8a32"]
    for method, path in callback.quantized_paths.items():
        alone = TinyQCallback(method, report=False, weights="current", save=False)
        values = callback.results["val_acc"]
        assert values[f"delta/{method}"] == values[method] - values["float"]
        assert run.callback_metrics[f"tinyq/val_acc/{method}"] == values[method]
        assert f"tinyq/val_acc/delta/{method}" in run.callback_metrics
        assert f"tinyq/size_mb/{method}" in run.callback_metrics
        assert Path(path).name.startswith(f"{method}-epoch=")
        loaded = load_quantized(path, Counts)
        trainer(tmp_path / method, alone, max_epochs=0).fit(Counts(), loader(), loader(seed=1))
        tested = trainer(tmp_path).validate(loaded, loader(seed=1), verbose=False)[0]
        assert tested["val_acc"] == pytest.approx(values[method], abs=1e-6)


def test_a_list_in_yaml_is_the_same(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("method: [w8a32, w8a8]\nexclude: [head]\n")
    callback = TinyQCallback(str(path), report=False)
    fit(tmp_path, callback)
    assert list(callback.quantized_paths) == ["w8a32", "w8a8"]
    assert all([decision.method for decision in plan][-1] == "float" for plan in callback.plans.values())
    assert yaml.safe_load(QuantizationSpec.from_yaml(path).to_yaml())["method"] == ["w8a32", "w8a8"]


def test_methods_whose_rules_mix_are_told_apart_by_what_was_asked_for(tmp_path):
    rules = [{"match": "head", "method": "w8a16"}]
    callback = TinyQCallback({"method": ["w8a32", "w8a8"], "rules": rules}, report=False)
    fit(tmp_path, callback)
    assert {plan.label for plan in callback.plans.values()} == {"mixed"}
    assert set(callback.results["val_acc"]) == {"float", "w8a32", "delta/w8a32", "w8a8", "delta/w8a8"}
    assert len(set(callback.quantized_paths.values())) == 2
    for path in callback.quantized_paths.values():
        assert torch.load(path, weights_only=True)["tinyq"]["metrics"]["val_acc"].keys() == {"float", "mixed", "delta"}


def test_one_table_compares_them(tmp_path, capsys):
    fit(tmp_path, TinyQCallback(METHODS))
    shown = capsys.readouterr().out
    header = next(line for line in shown.splitlines() if " float " in line)
    assert header.split() == ["float", "w8a32", "delta", "w8a16", "delta", "w8a8", "delta"]
    assert {"val_acc", "weights", "file on disk"} <= {line.split("  ")[0] for line in shown.splitlines()}


TWINS = {"method": ["w8a8", "w8a16", "w8a32"], "rules": [{"match": "*", "method": "w8a16"}]}


def test_methods_that_end_as_one_plan_have_one_file(tmp_path, capsys):
    callback = TinyQCallback(TWINS)
    fit(tmp_path, callback)
    assert list(callback.quantized_paths) == TWINS["method"]
    (path,) = set(callback.quantized_paths.values())
    assert sorted(each.suffix for each in tmp_path.glob("w8a*")) == [".ckpt", ".html", ".json", ".yaml"]
    shown = capsys.readouterr().out
    assert shown.count("layer by layer the same as w8a8, so one file is both") == 2
    assert shown.count(f"quantized  {path}") == 1

    at_test = TinyQCallback(TWINS, when="test_start", report=False)
    trainer(tmp_path, at_test).test(Counts(), loader(), ckpt_path=callback.float_path, verbose=False, weights_only=True)
    assert len(set(at_test.quantized_paths.values())) == 1


def test_at_test_time_one_pass_measures_all(tmp_path):
    run = trainer(tmp_path, keeper(tmp_path))
    run.fit(Net(), loader(shuffle=True), loader(seed=1))
    path = run.checkpoint_callback.best_model_path
    callback = TinyQCallback(METHODS, when="test_start", report="full")
    logged = trainer(tmp_path, callback).test(Net(), loader(seed=2), ckpt_path=path, verbose=False, weights_only=True)[
        0
    ]
    for method in METHODS:
        alone = TinyQCallback(method, when="test_start", report=False, save=False)
        trainer(tmp_path, alone).test(Net(), loader(seed=2), ckpt_path=path, verbose=False, weights_only=True)
        assert callback.results["test_acc"][method] == alone.results["test_acc"][method]
        assert logged[f"tinyq/test_acc/{method}"] == pytest.approx(alone.results["test_acc"][method])
        assert logged[f"tinyq/test_loss/delta/{method}"] == pytest.approx(alone.results["test_loss"]["delta"], abs=1e-6)
        assert load_quantized(callback.quantized_paths[method], Net)
        assert Path(callback.quantized_paths[method]).with_suffix(".html").exists()


def test_keep_smallest_saves_one_within_the_budget_and_says_so(tmp_path, capsys):
    callback = TinyQCallback(METHODS, monitor="val_acc", max_drop=0.5, keep="smallest")
    fit(tmp_path, callback)
    assert len(callback.quantized_paths) == 1
    assert set(callback.plans) == set(METHODS)
    (kept,) = callback.quantized_paths
    lost = {method: -callback.results["val_acc"][f"delta/{method}"] for method in METHODS}
    assert lost[kept] == min(lost.values()), "all are as small, so the one that loses least is kept"
    assert len(list(tmp_path.glob("w8a*.ckpt"))) == 1
    assert callback.plan is callback.plans[kept]
    shown = capsys.readouterr().out
    assert shown.count("not saved: keep: smallest keeps the smallest method within the budget") == len(METHODS) - 1
    assert f"{kept}: budget met: " in shown


def test_keep_all_brings_each_within_the_budget(tmp_path):
    module = Counts()
    run = trainer(tmp_path, limit_val_batches=0)
    run.fit(module, loader(shuffle=True), loader(seed=1))
    with torch.no_grad():
        module.head.weight[:, 0] = 400
        module.body[2].bias[0] = -1e6  # a unit that is always off, so that the huge weight changes nothing in float
    callback = TinyQCallback(METHODS, weights="current", monitor="val_acc", max_drop=0.01, report=False)
    trainer(tmp_path, callback, max_epochs=0).fit(module, loader(), loader(seed=1))
    assert list(callback.quantized_paths) == METHODS
    assert all(callback.results["val_acc"][f"delta/{method}"] >= -0.01 for method in METHODS)
    assert all(next(d for d in plan if d.name == "head").method == "float" for plan in callback.plans.values())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (["w8a8", "w8a8"], "'w8a8' is in the list twice"),
        ([], "list of methods is empty"),
        (["w8a8", "w8a9"], "'w8a9' is not a method. Did you mean 'w8a8'"),
        (["w8a8", "float"], "float model is measured in any case"),
        ({"method": ["w8a8", 8]}, "int 8 is not a method"),
        ({"keep": "smallest"}, "needs a budget"),
        ({"keep": "biggest"}, "'biggest' is not a value of keep"),
    ],
)
def test_a_wrong_list_is_refused_when_it_is_given(spec, message):
    with pytest.raises(SpecError, match=message):
        TinyQCallback(spec)


def test_a_model_is_quantized_by_one_method():
    with pytest.raises(SpecError, match="give the list to TinyQCallback"):
        quantize(Net(), {"method": ["w8a32", "w8a8"]})
