"""A run exports its quantized model beside the checkpoint, and a failing export costs nothing else."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exported_nets import needs_onnx
from lightnings import CSVLogger, MLFlowLogger, WandbLogger
from models import FEATURES, Data, Net, keeper, loader, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tinyq_lightning import QuantizationSpec, TinyQCallback, load_quantized
from tinyq_lightning.errors import MissingExtraError, SpecError
from tinyq_lightning.handover import FORMATS
from tinyq_lightning.search import Stopwatch


def fitted(tmp_path, **kwargs):
    callback = TinyQCallback(kwargs.pop("spec", "w8a8"), **kwargs)
    trainer(tmp_path, keeper(tmp_path), callback).fit(Net(), loader(shuffle=True), loader(seed=1))
    return callback


def points(count=5):
    return torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(0))


def test_an_export_lies_beside_the_checkpoint_with_its_comparison_in_the_report(tmp_path, capsys):
    callback = fitted(tmp_path, export="pt2")
    path = Path(callback.quantized_path).with_suffix(".pt2")
    with torch.no_grad():
        out = torch.export.load(path).module()(points())
        torch.testing.assert_close(out, load_quantized(callback.quantized_path, Net)(points()), rtol=1e-3, atol=1e-3)
    told = json.loads(Path(callback.quantized_path).with_suffix(".json").read_text())["exports"]
    assert [(each["format"], each["path"], each["files"]) for each in told] == [("pt2", path.name, [path.name])]
    assert told[0]["relative_error"] <= told[0]["max_error"]
    shown = capsys.readouterr().out
    assert str(path) in shown
    assert "here ms" in shown
    assert "Exports" in Path(callback.quantized_path).with_suffix(".html").read_text()
    assert callback.error is None


def test_the_yaml_asks_for_several_formats_and_each_method_has_them(tmp_path):
    spec = QuantizationSpec.from_dict({"method": ["w8a32", "w8a8"], "export": ["pt2", "safetensors"]})
    callback = fitted(tmp_path, spec=spec, report=False)
    for path in callback.quantized_paths.values():
        assert Path(path).with_suffix(".pt2").is_file()
        assert Path(path).with_suffix(".safetensors").is_file()
        assert "export" not in torch.load(path, weights_only=True)["tinyq"]["spec"]
    assert QuantizationSpec.from_dict(spec.to_dict()) == spec


def test_a_test_run_exports_too(tmp_path):
    fitted(tmp_path, report=False)
    callback = TinyQCallback("w8a32", when="test_start", export="pt2", report=False)
    path = next(tmp_path.rglob("epoch*.ckpt"))
    trainer(tmp_path, callback).test(Net(), loader(seed=2), ckpt_path=path, verbose=False, weights_only=False)
    assert callback.error is None
    assert Path(callback.quantized_path).with_suffix(".pt2").is_file()


class OfADict(Net):
    """Batches are dicts; forward takes one of their entries by name."""

    def training_step(self, batch, index):
        return super().training_step([batch["x"], batch["label"]], index)

    def validation_step(self, batch, index):
        return super().validation_step([batch["x"], batch["label"]], index)


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.data = TensorDataset(*loader().dataset.tensors)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, label = self.data[index]
        return {"label": label, "x": x}


def test_inputs_come_from_a_batch_that_is_a_dict(tmp_path):
    callback = TinyQCallback("w8a8", export="pt2", report=False)
    data = DataLoader(Rows(), batch_size=32)
    trainer(tmp_path, keeper(tmp_path), callback).fit(OfADict(), data, data)
    assert callback.error is None
    assert Path(callback.quantized_path).with_suffix(".pt2").is_file()


def test_a_failing_export_is_a_warning_and_costs_nothing_else(tmp_path, monkeypatch):
    def fails(request, path):
        raise ZeroDivisionError("no luck")

    monkeypatch.setitem(FORMATS, "pt2", replace(FORMATS["pt2"], write=fails))
    with pytest.warns(UserWarning, match=r"Exporting to pt2 failed: (?s:.*)ZeroDivisionError: no luck"):
        callback = fitted(tmp_path, export=["pt2", "safetensors"])
    stem = Path(callback.quantized_path).with_suffix("")
    assert {each.suffix for each in stem.parent.glob(f"{stem.name}.*")} == {
        ".ckpt",
        ".html",
        ".json",
        ".safetensors",
        ".yaml",
    }
    assert "val_acc" in callback.results
    assert "no luck" in str(callback.error)
    told = json.loads(stem.with_suffix(".json").read_text())
    assert [each["format"] for each in told["exports"]] == ["safetensors"]


class TakesMore(Net):
    def forward(self, x, scale):
        return super().forward(x * scale)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch[0], torch.ones(())), batch[1])

    def validation_step(self, batch, index):
        self.log("val_acc", -self.training_step(batch, index))


def test_without_an_example_a_warning_says_what_to_set(tmp_path):
    callback = TinyQCallback("w8a8", export="pt2", report=False)
    run = trainer(tmp_path, keeper(tmp_path), callback)
    with pytest.warns(UserWarning, match=r"Exporting to pt2 failed(?s:.*)set self\.example_input_array in __init__"):
        run.fit(TakesMore(), loader(), loader())
    assert Path(callback.quantized_path).is_file()


def test_what_cannot_be_exported_is_an_error_before_training(tmp_path, monkeypatch):
    with pytest.raises(SpecError, match=r"'pt3' is not a format\. Did you mean 'pt2'"):
        TinyQCallback("w8a8", export="pt3")
    with pytest.raises(SpecError, match="needs save=True"):
        TinyQCallback("w8a8", export="pt2", save=False)
    with pytest.raises(SpecError, match=r"export\.1.*in the list twice"):
        QuantizationSpec.from_dict({"export": ["pt2", "pt2"]})
    monkeypatch.setitem(FORMATS, "pt2", replace(FORMATS["pt2"], modules=("no_such_library",), extra="some"))
    with pytest.raises(MissingExtraError, match="no_such_library"):
        fitted(tmp_path, export="pt2")
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.filterwarnings("ignore")  # of MLflow's and SQLAlchemy's among themselves
def test_mlflow_gets_all_files_if_asked(tmp_path):
    logger = MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", artifact_location=str(tmp_path / "artifacts"))
    callback = TinyQCallback("w8a8", export="pt2", log_files=True)
    trainer(tmp_path, keeper(tmp_path), callback, logger=logger).fit(Net(), loader(), loader(seed=1))
    assert callback.error is None
    stem = Path(callback.quantized_path).stem
    sent = {each.name: each.read_bytes() for each in (tmp_path / "artifacts").rglob(f"tinyq/{stem}.*")}
    assert set(sent) == {f"{stem}{ending}" for ending in (".ckpt", ".pt2", ".json", ".html", ".yaml")}
    assert sent[f"{stem}.ckpt"] == Path(callback.quantized_path).read_bytes()


def test_weights_and_biases_gets_all_files_if_asked(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_SILENT"):
        monkeypatch.setenv(name, "offline" if name == "WANDB_MODE" else "true")
    sent = {}
    log = wandb.sdk.wandb_run.Run.log_artifact

    def noted(self, artifact, *args, **kwargs):
        sent[artifact.name] = {
            name: Path(entry.local_path).read_bytes() for name, entry in artifact.manifest.entries.items()
        }
        return log(self, artifact, *args, **kwargs)

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log_artifact", noted)
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    callback = TinyQCallback("w8a8", export="pt2", log_files=True)
    trainer(tmp_path, keeper(tmp_path), callback, logger=logger).fit(Net(), loader(), loader(seed=1))
    wandb.finish()
    assert callback.error is None
    stem = Path(callback.quantized_path).stem
    (files,) = (files for name, files in sent.items() if name.startswith("tinyq-w8a8-"))
    assert set(files) == {f"{stem}{ending}" for ending in (".ckpt", ".pt2", ".json", ".html", ".yaml")}
    assert files[f"{stem}.ckpt"] == Path(callback.quantized_path).read_bytes()


def test_a_logger_that_takes_no_files_is_a_warning(tmp_path):
    callback = TinyQCallback("w8a8", log_files=True, report=False)
    run = trainer(tmp_path, keeper(tmp_path), callback, logger=CSVLogger(tmp_path), log_every_n_steps=2)
    with pytest.warns(UserWarning, match="no logger of the run takes files as MLflow's does: CSVLogger"):
        run.fit(Net(), loader(), loader(seed=1))
    assert callback.error is None


@pytest.mark.filterwarnings("ignore:TinyQ. .*is slower quantized than as float here")
def test_a_model_that_stays_float_is_not_exported_and_that_is_no_failure(tmp_path, monkeypatch):
    slower = dict.fromkeys(("body.0", "body.2", "head"), ("float", "left float: it is slower"))
    monkeypatch.setattr(Stopwatch, "slower", lambda self, swap: slower)
    callback = fitted(tmp_path, export="pt2", never_slower=True, strict=True)
    assert callback.error is None
    assert not list(tmp_path.glob("*.pt2"))


class Plain(Net):
    """Without an example of its inputs, so that they come from the calls of its validation."""

    def __init__(self):
        super().__init__()
        self.example_input_array = None


@needs_onnx
@pytest.mark.parametrize("when", ["fit_end", "test_start"])
def test_static_activations_take_ranges_from_validation_and_are_measured(tmp_path, when, capsys):
    export = {"to": "onnx", "activations": "static", "batches": 2}
    callback = TinyQCallback("w8a8", when=when, export=["onnx", export])
    run = trainer(tmp_path, keeper(tmp_path), callback)
    data = Data()
    run.fit(Plain(), datamodule=data)
    if when == "test_start":
        run.test(run.lightning_module, datamodule=data, verbose=False)
    assert callback.error is None
    path = Path(callback.quantized_path)
    dynamic, static = json.loads(path.with_suffix(".json").read_text())["exports"]
    assert [dynamic["path"], static["path"]] == [f"{path.stem}.onnx", f"{path.stem}-static.onnx"]
    assert b"QuantizeLinear" in path.with_name(static["path"]).read_bytes()
    metrics = {name: values["w8a8"] for name, values in callback.results.items()}
    assert dynamic["metrics"] == {}
    assert static["metrics"] == pytest.approx(metrics, abs=0.05)
    assert static["metrics"] != metrics
    assert "forward" not in vars(run.lightning_module)
    assert f"{path.stem}-static.onnx" in capsys.readouterr().out


class NeverCalled(Net):
    def training_step(self, batch, index):
        return nn.functional.cross_entropy(Net.forward(self, batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("val_acc", -self.training_step(batch, index))


@needs_onnx
def test_a_module_whose_forward_is_never_called_gives_no_ranges_and_the_rest_stands(tmp_path):
    callback = TinyQCallback("w8a8", export=[{"to": "onnx", "activations": "static"}, "pt2"], report=False)
    run = trainer(tmp_path, keeper(tmp_path), callback)
    with pytest.warns(UserWarning, match=r"Exporting to onnx failed(?s:.*)never calls self\(\.\.\.\)"):
        run.fit(NeverCalled(), loader(), loader())
    assert Path(callback.quantized_path).with_suffix(".pt2").is_file()


@pytest.mark.parametrize(
    ("export", "message"),
    [
        (
            {"to": "pt2", "activations": "static"},
            r"export\.activations\): the format pt2 rounds activations as they come",
        ),
        (
            [{"to": "onnx", "activation": "static"}],
            r"export\.0\.activation\): unknown key.* Did you mean 'activations'",
        ),
        ({"to": "onnx", "activations": "fixed"}, r"'fixed' is not a way to round activations"),
        ({"to": "onnx", "activations": "static", "batches": 0}, "at least 1, not int 0"),
        ({"to": "safetensors", "measure": True}, "does not run, so it cannot be measured"),
        (["onnx", {"to": "onnx", "batches": 3}], r"export\.1\): 'onnx' is in the list twice"),
        ({"activations": "static"}, "the key 'to' is missing"),
    ],
)
def test_a_wrong_export_is_an_error_with_its_place(export, message):
    with pytest.raises(SpecError, match=message):
        TinyQCallback("w8a8", export=export)
    with pytest.raises(SpecError, match=message):
        QuantizationSpec.from_dict({"method": "w8a8", "export": export})


def test_exports_of_the_yaml_come_back(tmp_path):
    asked = ["pt2", {"to": "onnx", "activations": "static-signed", "batches": 3}, {"to": "aoti", "measure": True}]
    spec = QuantizationSpec.from_dict({"method": "w8a8", "export": asked})
    assert spec.to_dict()["export"] == asked
    spec.to_yaml(tmp_path / "spec.yaml")
    assert QuantizationSpec.from_yaml(tmp_path / "spec.yaml") == spec
