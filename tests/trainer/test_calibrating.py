"""Calibration in a run: by the user's validation batches alone, before what is timed, searched and saved."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from exported_nets import needs_onnx
from lightnings import LightningDataModule, LightningModule
from models import Blobs, Net, keeper, loader, trainer
from ranks import run_on_ranks, written_by_ranks
from torch.utils.data import DataLoader, Dataset

from tinyq_lightning import TinyQCallback, load_quantized, quantize
from tinyq_lightning.command.cli import main
from tinyq_lightning.errors import EvaluationError, SpecError

read: list[tuple[int, int]] = []
"""Seed and index of each sample that was read; what a dataset holds is put back after an evaluation."""


class Recorded(Dataset):
    """Says which of its samples were read."""

    def __init__(self, seed, count=96):
        self.held, self.seed = loader(count, seed).dataset, seed

    def __len__(self):
        return len(self.held)

    def __getitem__(self, index):
        read.append((self.seed, index))
        return self.held[index]


def net(width=32):
    torch.manual_seed(0)
    return Net(width)


def fitted(root, spec="w4a32", module=None, data=None, callback=None, **kwargs):
    """The callback and the module after a run."""
    module = module or net()
    callback = callback or TinyQCallback(spec, **kwargs)
    run = trainer(root, keeper(root), callback)
    run.fit(module, *(data or (loader(shuffle=False), loader(seed=1))))
    return callback, module


def test_the_plan_the_file_and_the_report_tell_of_smaller_errors(tmp_path, capsys):
    callback, _ = fitted(tmp_path, calibrate=8)

    assert callback.error is None
    shares = [decision.output_error for decision in callback.plan]
    assert all(0 < share <= 1 for share in shares)
    assert min(shares) < 0.85
    path = Path(callback.quantized_path)
    entries = torch.load(path, weights_only=True)["tinyq"]["plan"]
    assert [entry["output_error"] for entry in entries] == shares
    report = json.loads(path.with_suffix(".json").read_text())
    assert [layer["output_error"] for layer in report["layers"]] == shares
    assert report["calibration"].startswith("calibrated on up to 8 batches: ")
    assert "the median the squared error of outputs is" in capsys.readouterr().out
    assert "Calibrated on up to 8 batches" in path.with_suffix(".html").read_text()
    resolved = path.with_suffix(".yaml").read_text()
    assert "only with the same validation batches" in resolved
    assert yaml.safe_load(resolved)["calibrate"] == {"batches": 8}


def test_the_metrics_are_those_of_the_file_that_was_saved(tmp_path):
    callback, _ = fitted(tmp_path, calibrate=4)
    loaded = load_quantized(callback.quantized_path, Net)
    (found,) = trainer(tmp_path).validate(loaded, loader(seed=1), verbose=False)
    assert found["val_loss"] == callback.results["val_loss"]["w4a32"]


def test_the_same_run_gives_the_same_bytes_and_the_spec_it_wrote_does_with_the_same_data(tmp_path):
    first, second = (fitted(tmp_path / name, calibrate={"batches": 4})[0] for name in "ab")
    again, _ = fitted(tmp_path / "c", str(Path(first.quantized_path).with_suffix(".yaml")))
    plain, _ = fitted(tmp_path / "d")
    states = [
        torch.load(each.quantized_path, weights_only=True)["state_dict"] for each in (first, second, again, plain)
    ]
    for state in states[1:3]:
        assert all(torch.equal(value, state[name]) for name, value in states[0].items())
    assert any(not torch.equal(value, states[3][name]) for name, value in states[0].items())


def test_the_module_and_the_random_state_are_as_without(tmp_path):
    _, plain = fitted(tmp_path / "a")
    expected = torch.rand(4)
    _, module = fitted(tmp_path / "b", calibrate=8)
    assert torch.equal(torch.rand(4), expected)
    state = plain.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert vars(module).keys() == vars(plain).keys()
    assert not any(each._forward_pre_hooks for each in module.modules())


def read_for_calibration(root, spec):
    """The callback, and which samples of the validation data are read more than without calibration, how often."""
    found = []
    for name, more in (("a", {}), ("b", {"calibrate": 2})):
        read.clear()
        loaders = loader(shuffle=False), DataLoader(Recorded(seed=1), batch_size=16)
        callback, _ = fitted(root / name, spec, data=loaders, report=False, **more)
        found.append(Counter(read))
    return callback, found[1] - found[0]


def test_as_many_validation_batches_as_asked_are_read(tmp_path):
    assert read_for_calibration(tmp_path, "w4a32")[1] == Counter((1, index) for index in range(32))


def test_methods_with_the_same_codes_are_calibrated_once(tmp_path):
    callback, more = read_for_calibration(tmp_path, ["w4a16", "w4a8"])
    assert more == Counter((1, index) for index in range(32))
    files = [torch.load(path, weights_only=True)["state_dict"] for path in callback.quantized_paths.values()]
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())


@pytest.mark.filterwarnings("ignore:TinyQ")
def test_what_is_timed_and_searched_has_the_calibrated_codes(tmp_path):
    callback, _ = fitted(
        tmp_path, "w4a8", calibrate=4, never_slower=True, monitor="val_loss", mode="min", max_drop=1e-6, report="full"
    )
    assert callback.error is None
    for decision in callback.plan:
        assert (decision.output_error is None) == (not decision.method.startswith("w4"))


class Distant(Net):
    """Logs how far its logits are from those with the weights that training ended with."""

    def on_train_end(self):
        self.trained = copy.deepcopy((self.body[0], self.body[2], self.head))

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)
        first, second, head = getattr(self, "trained", (self.body[0], self.body[2], self.head))
        self.log("val_far", (self(batch[0]) - head(second(first(batch[0]).relu()).relu())).square().mean())


def test_a_layer_that_a_budget_gives_eight_bits_has_the_codes_that_it_has_without_data(tmp_path):
    def run(name, spec, **more):
        torch.manual_seed(0)
        return fitted(tmp_path / name, spec, Distant(32), **more)[0]

    spec = {"method": "w4a32", "weights": "current", "calibrate": 4}
    budget = {"monitor": "val_far", "mode": "min", "ladder": ["w4a32", "w8a32", "float"]}
    far = run("a", spec).results["val_far"]["w4a32"]
    callback = run("b", spec | {"budget": budget | {"max_drop": far / 2}})
    assert callback.search.met
    assert {decision.method for decision in callback.plan} == {"w4a32", "w8a32"}
    again = run("c", str(Path(callback.quantized_path).with_suffix(".yaml")))
    rules = callback.plan.to_spec().to_dict()["rules"]
    plain = run("d", {"method": "w4a32", "weights": "current", "rules": rules})

    files = [torch.load(each.quantized_path, weights_only=True)["state_dict"] for each in (callback, again, plain)]

    for decision in callback.plan:
        assert (decision.output_error is None) == (decision.method == "w8a32")
        if decision.method == "w8a32":
            codes = f"{decision.name}.int8_weights"
            assert torch.equal(files[0][codes], files[2][codes])
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())


def test_mixed_precision_is_calibrated_in_float32(tmp_path):
    torch.manual_seed(0)
    callback = TinyQCallback("w4a32", calibrate=4, report=False)
    run = trainer(tmp_path, callback, precision="bf16-mixed")
    run.fit(net(), loader(), loader(seed=1))
    assert callback.error is None
    assert min(decision.output_error for decision in callback.plan) < 0.9


def test_without_a_validation_loop_calibration_is_refused_before_training(tmp_path):
    class Blind(Net):
        validation_step = LightningModule.validation_step

    module = Blind()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(
        EvaluationError, match="calibrate chooses codes by the batches of the validation loop, but Blind"
    ):
        trainer(tmp_path, TinyQCallback("w4a32", calibrate=8)).fit(module, loader())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@needs_onnx
def test_so_are_the_ranges_of_static_activations(tmp_path):
    class Blind(Net):
        validation_step = LightningModule.validation_step

    callback = TinyQCallback("w8a8", export={"to": "onnx", "activations": "static"})
    with pytest.raises(EvaluationError, match="static activations take their ranges from the validation loop, but Bl"):
        trainer(tmp_path, callback).fit(Blind(), loader())


def test_values_that_are_not_finite_cost_a_line_of_the_plan_not_the_file(tmp_path):
    class Broken(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self(torch.full_like(batch[0], float("nan")))
            super().validation_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="codes were chosen without data.*its inputs are NaN or infinite"):
        callback, _ = fitted(tmp_path, module=Broken(), calibrate=8)
    assert callback.error is None
    assert callback.quantized_path
    assert all("NaN or infinite" in decision.uncalibrated for decision in callback.plan)


def test_a_test_run_is_calibrated_by_validation_data_and_tests_what_it_would(tmp_path):
    class Data(LightningDataModule):
        def val_dataloader(self):
            return DataLoader(Recorded(seed=1), batch_size=16)

        def test_dataloader(self):
            return DataLoader(Recorded(seed=2), batch_size=16)

    read.clear()
    plain, module = TinyQCallback("w4a32", when="test_start", report=False), net()
    trainer(tmp_path / "a", plain).test(module, datamodule=Data(), verbose=False)
    tested, before = list(read), copy.deepcopy(module.state_dict())
    read.clear()

    callback = TinyQCallback("w4a32", when="test_start", calibrate=4, report=False)
    trainer(tmp_path / "b", callback).test(module, datamodule=Data(), verbose=False)

    assert callback.error is None
    assert read == [(1, index) for index in range(64)] + tested
    assert min(decision.output_error for decision in callback.plan) < 0.85
    assert callback.results["test_acc"]["float"] == plain.results["test_acc"]["float"]
    loaded = load_quantized(callback.quantized_path, Net, width=32)
    (found,) = trainer(tmp_path).test(loaded, datamodule=Data(), verbose=False)
    assert found["test_loss"] == callback.results["test_loss"]["w4a32"]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_data_module_is_left_as_a_test_run_without_calibration_leaves_it(tmp_path):
    data = Blobs()
    callback = TinyQCallback("w4a32", when="test_start", calibrate=4, report=False)
    run = trainer(tmp_path, callback)
    run.test(net(), datamodule=data, verbose=False)
    assert callback.error is None
    assert data.setups == 1
    assert data.trainer is run
    assert run.fit_loop.epoch_loop.val_loop._combined_loader is None


def without_validation():
    class Data(LightningDataModule):
        def test_dataloader(self):
            return loader(seed=2)

    return {"datamodule": Data()}


def set_up_for_fit_alone():
    class Data(LightningDataModule):
        def val_dataloader(self):
            return DataLoader(self.val)

        def test_dataloader(self):
            return loader(seed=2)

    return {"datamodule": Data()}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (lambda: {"dataloaders": loader(seed=2)}, "this test run has no validation dataloader"),
        (without_validation, "this test run has no validation dataloader"),
        (set_up_for_fit_alone, r"could not be had in this test run \(AttributeError: .*val"),
    ],
)
def test_a_test_run_without_validation_data_is_refused(tmp_path, given, text):
    module = net()
    with pytest.raises(EvaluationError, match=f"{text}.*never by what is tested"):
        trainer(tmp_path, TinyQCallback("w4a32", when="test_start", calibrate=8)).test(module, **given())
    assert type(module.head) is torch.nn.Linear


def test_verify_compares_all_that_data_did_not_choose(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text("from models import Net\n")
    monkeypatch.syspath_prepend(tmp_path)
    callback, _ = fitted(tmp_path, calibrate=8, report=False)
    arguments = ["verify", callback.quantized_path, "--model", "nets:Net", "--float", callback.float_path]

    assert main(arguments) == 0
    assert "but for codes and biases of 3 layers, which were chosen by data that is not here" in capsys.readouterr().out

    other, _ = fitted(tmp_path / "other", report=False, module=Net(32))
    assert main([*arguments[:-1], other.float_path]) == 1


@pytest.mark.slow
def test_two_processes_have_the_codes_of_the_data_of_both(tmp_path):
    run_on_ranks("ddp_calibrate.py", tmp_path)
    ranks = written_by_ranks(tmp_path, "codes")
    assert ranks[0]["together"] == ranks[1]["together"]
    assert ranks[0]["alone"] != ranks[1]["alone"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "batches must be a whole number of at least 1, not int 0"),
        (True, "batches must be a whole number"),
        ("8", r"calibrate.*must be a mapping"),
        ({"batches": 2.5}, "batches must be a whole number"),
        ({"batchs": 8}, "unknown key 'batchs'. Did you mean 'batches'?"),
        ({}, "the key 'batches' is missing"),
    ],
)
def test_what_is_no_number_of_batches_is_refused(value, text):
    with pytest.raises(SpecError, match=text):
        TinyQCallback("w4a32", calibrate=value)
    with pytest.raises(SpecError, match=text):
        quantize(net(), {"method": "w4a32", "calibrate": value}, calibration=[torch.randn(4, 8)])
