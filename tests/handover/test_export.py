"""What is exported is compared, reported, and written whole or not at all."""

import os
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from exported_nets import needs_onnx
from torch import nn

import tinyq_lightning
from tinyq_lightning import TinyQError, export, quantize
from tinyq_lightning.errors import ExportError, MissingExtraError, ModelError
from tinyq_lightning.handover import FORMATS, Program
from tinyq_lightning.methods import FORMAT_NAMES, STATIC_FORMATS, TENSOR_FORMATS

# torch.export of torch 2.7 refuses a model that keeps a tensor or makes a list longer when it is called
MAY_CHANGE = hasattr(torch.onnx, "ops")


class Counting(nn.Module):
    """Changes itself in many ways when it is called, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.register_buffer("total", torch.zeros(()))
        self.calls, self.seen, self.last = 0, [], None

    def forward(self, x):
        self.calls += 1
        if MAY_CHANGE:
            self.seen.append(x.shape[0])
            self.last = x
        self.total.add_(1)
        return self.norm(self.layer(x)) + torch.rand(()) * 0 + random.random() * 0 + np.random.rand() * 0


def example(rows=3):
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(0))


def mlp(method="w8a8"):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    quantize(model, method)
    return model


def test_the_report_has_errors_sizes_times_and_the_sizes_that_were_tried(tmp_path):
    path = tmp_path / "net.pt2"
    report = export(mlp(), path, example())
    assert report.format == "pt2"
    assert report.files == (str(path),)
    assert report.bytes == path.stat().st_size
    assert report.ms > 0
    assert report.model_ms > 0
    assert [each["input"] for each in report.inputs] == [(3, 8), (1, 8), (6, 8)]
    assert [each.name for each in report.outputs] == ["output"]
    assert report.relative_error <= report.max_error
    assert "net.pt2" in str(report)
    assert report.to_dict()["relative_error"] == report.relative_error


def test_the_model_is_as_it_was(tmp_path):
    model = Counting().train()
    quantize(model, "w8a8")
    hook = model.register_forward_hook(lambda *_: None)
    model.layer.bias.grad = torch.ones(16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = list(model.modules())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    export(model, tmp_path / "net.pt2", example())
    assert model.training
    assert model.norm.training
    assert (model.calls, model.seen, model.last) == (0, [], None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
    assert hook.id in model._forward_hooks
    assert torch.equal(model.layer.bias.grad, torch.ones(16))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_what_is_further_off_than_the_bound_leaves_no_file(tmp_path, monkeypatch):
    wrong = replace(FORMATS["pt2"], open=lambda path, request: lambda given: [request.module(*given.args) * 1.5])
    monkeypatch.setitem(FORMATS, "pt2", wrong)
    with pytest.raises(ExportError, match=r"output of what was written is 0\.5 from the quantized model, more than"):
        export(mlp(), tmp_path / "new" / "net.pt2", example())
    assert not list(tmp_path.iterdir())
    assert export(mlp(), tmp_path / "new" / "net.pt2", example(), max_error=0.6).relative_error == pytest.approx(0.5)


@pytest.mark.parametrize("step", ["write", "open"])
def test_a_runtime_that_fails_leaves_no_file_and_the_former_one_stands(tmp_path, monkeypatch, step):
    path = tmp_path / "net.pt2"
    path.write_text("mine")

    def fails(*_):
        raise ZeroDivisionError("no luck")

    monkeypatch.setitem(FORMATS, "pt2", replace(FORMATS["pt2"], **{step: fails}))
    with pytest.raises(ExportError, match=r"pt2: the model could not be .*ZeroDivisionError: no luck"):
        export(mlp(), path, example(), overwrite=True)
    assert os.listdir(tmp_path) == ["net.pt2"]
    assert path.read_text() == "mine"


def test_files_are_replaced_only_if_asked(tmp_path):
    path = tmp_path / "net.pt2"
    path.write_text("mine")
    with pytest.raises(ExportError, match="there is such a file already"):
        export(mlp(), path, example())
    assert path.read_text() == "mine"
    export(mlp(), path, example(), overwrite=True)
    assert torch.export.load(path)


def test_a_format_of_several_files_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    def write(request, path):
        for ending in (".pt2", ".bin"):
            with open(path.removesuffix(".pt2") + ending, "w") as file:
                file.write(ending)
        return ["two files"]

    two = replace(FORMATS["pt2"], write=write, open=lambda path, request: lambda given: [request.module(*given.args)])
    monkeypatch.setitem(FORMATS, "pt2", two)
    (tmp_path / "net.bin").write_text("mine")
    with pytest.raises(ExportError, match=r"net\.bin: there is such a file already"):
        export(mlp(), tmp_path / "net.pt2", example())
    assert os.listdir(tmp_path) == ["net.bin"]
    assert (tmp_path / "net.bin").read_text() == "mine"
    report = export(mlp(), tmp_path / "net.pt2", example(), overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["net.bin", "net.pt2"]
    assert (tmp_path / "net.bin").read_text() == ".bin"
    assert report.files == (str(tmp_path / "net.pt2"), str(tmp_path / "net.bin"))
    assert report.notes == ("two files",)


MISTAKES = [
    ({"path": "net.xyz"}, "its ending names no format"),
    ({"path": "nowhere://place/net.pt2"}, "cannot be written there: Protocol not known: nowhere"),
    ({"path": "/dev/null/net.pt2", "example_inputs": None}, "cannot be written there: FileExistsError"),
    ({"path": "net.pt2", "to": "tflite"}, "there is no format 'tflite'"),
    ({"model": nn.Linear(8, 2)}, "Linear has no quantized layer"),
    ({"example_inputs": None}, "no example of its inputs"),
    ({"example_inputs": (torch.ones(1, 8), torch.ones(1))}, "does not take the example inputs"),
    ({"example_inputs": (7,)}, "hold no tensor"),
    ({"example_inputs": torch.ones(2, 5)}, r"failed on inputs of the shapes input \[2, 5\]"),
    ({"method": "fly"}, "no method 'fly'"),
    ({"dynamic": {"y": {0: "batch"}}}, "dynamic names 'y', and the inputs are input"),
    ({"dynamic": {"input": {5: "batch"}}}, "names dimension 5"),
    ({"dynamic": {0: 3}}, "must be a name or a torch.export.Dim"),
    ({"activations": "static", "calibration": [torch.ones(1, 8)]}, "leave activations out"),
    ({"calibration": [torch.ones(1, 8)]}, "belong together"),
]


@pytest.mark.parametrize(("given", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_an_error_and_no_file(tmp_path, given, message):
    arguments = {"model": mlp(), "path": "net.pt2", "example_inputs": example(), **given}
    model, path = arguments.pop("model"), arguments.pop("path")
    path = path if "://" in path else tmp_path / path
    with pytest.raises(TinyQError, match=message):
        export(model, path, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_library_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "pt2", replace(FORMATS["pt2"], modules=("no_such_library",), extra="some"))
    with pytest.raises(MissingExtraError, match=r"needs no_such_library: pip install 'tinyq-lightning\[some\]'"):
        export(mlp(), tmp_path / "net.pt2", example())


def test_weights_without_values_are_refused(tmp_path):
    with pytest.raises(ModelError, match="meta device"):
        export(mlp().to("meta"), tmp_path / "net.pt2", example())


def test_the_names_are_public():
    assert tinyq_lightning.export is export


def test_every_format_that_the_command_line_offers_can_be_written():
    assert list(FORMATS) == list(FORMAT_NAMES)
    assert tuple(name for name, each in FORMATS.items() if not isinstance(each, Program)) == TENSOR_FORMATS
    assert tuple(name for name, each in FORMATS.items() if getattr(each, "static", False)) == STATIC_FORMATS


class Halving(nn.Module):
    """Takes an even number of rows only."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x):
        return self.layer(x.reshape(-1, 2, 8).sum(1))


def test_sizes_that_the_model_itself_does_not_take_are_noted_and_not_tried(tmp_path, monkeypatch):
    runs = replace(FORMATS["pt2"], write=lambda request, path: open(path, "w").close() or ["fine"])
    runs = replace(runs, open=lambda path, request: lambda given: [request.module(*given.args)])
    monkeypatch.setitem(FORMATS, "pt2", runs)
    model = Halving()
    quantize(model, "w8a32")
    report = export(model, tmp_path / "net.pt2", example(4))
    assert [each["x"] for each in report.inputs] == [(4, 8)]
    assert report.notes[0] == "fine"
    assert report.notes[1].startswith("not tried with batch 1: the model failed on inputs of the shapes x [1, 8]")


@needs_onnx
def test_calibration_is_several_inputs(tmp_path):
    with pytest.raises(ExportError, match=r"write calibration=\[x\]"):
        export(mlp(), tmp_path / "net.onnx", example(), activations="static", calibration=example())
    assert not list(tmp_path.iterdir())


def test_a_module_without_forward_is_told_to_export_the_part_that_has_one(tmp_path):
    from lightnings import LightningModule

    class Steps(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(8, 4)

    model = Steps()
    quantize(model, "w8a32")
    with pytest.raises(
        ModelError, match=r"Steps has no forward, .*`return self.net\(x\)`, or .*export\(model.net, path"
    ):
        export(model, tmp_path / "net.pt2", torch.zeros(2, 8))
    assert export(model.net, tmp_path / "net.pt2", torch.zeros(2, 8)).bytes
