"""Static activations: rounded by ranges from calibration, and the user's own loop over an exported file."""

import pytest
import torch
from exported_nets import NETS
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from tinyq_lightning import export, quantize
from tinyq_lightning.errors import ExportError
from tinyq_lightning.handover import session_forward

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.skipif(not hasattr(torch.onnx, "ops"), reason="needs torch 2.8")


def quantized(name, method="w8a8"):
    torch.manual_seed(0)
    net, inputs, _ = NETS[name]()
    quantize(net.eval(), method)
    return net, inputs


def batches(*shape, count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def test_a_resnet_is_rounded_around_every_convolution_and_fused(tmp_path):
    net, inputs = quantized("resnet")
    path, seen = tmp_path / "net.onnx", tmp_path / "fused.onnx"
    report = export(net, path, inputs, activations="static", calibration=batches(8, 3, 16, 16))
    assert report.relative_error < 0.1
    graph = onnx.load(path).graph
    made_by = {output: node for node in graph.node for output in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert all(made_by[name].op_type == "DequantizeLinear" for node in convolutions for name in node.input[:2])
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(seen)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    run = [node.op_type for node in onnx.load(seen).graph.node]
    assert run.count("QLinearConv") == len(convolutions)
    assert run.count("QLinearAdd") == 8
    assert not {"Conv", "FusedConv"} & set(run)


@pytest.mark.parametrize(("name", "shape"), [("mlp", (16, 8)), ("convolutions", (4, 3, 12, 12))])
@pytest.mark.parametrize("ending", ["onnx", "xml"])
def test_other_nets_are_near_in_both_runtimes(tmp_path, name, shape, ending):
    pytest.importorskip("openvino")
    net, inputs = quantized(name)
    report = export(net, tmp_path / f"net.{ending}", inputs, activations="static", calibration=batches(*shape))
    assert 1e-4 < report.relative_error < 0.1


class Heard(nn.Module):
    """A convolution without a batch, before a recurrent layer and another convolution."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv1d(3, 16, 3, padding=1), nn.Conv1d(8, 4, 3)
        self.gru = nn.GRU(16, 8, batch_first=True)

    def forward(self, x):
        return self.last(self.gru(torch.relu(self.first(x)).t())[0].t())


@pytest.mark.parametrize(("ending", "activations"), [("onnx", "static-signed"), ("xml", "static")])
def test_changes_of_shape_and_recurrent_layers_between_convolutions(tmp_path, ending, activations):
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    net, given = Heard().eval(), batches(3, 9)
    quantize(net, "w8a8")
    path = tmp_path / f"net.{ending}"
    report = export(net, path, given[0], activations=activations, calibration=given, dynamic=False)
    assert report.relative_error < 0.1
    assert any("recurrent layers are float32" in note for note in report.notes) == (ending == "xml")


def test_signed_activations_have_no_zero_points(tmp_path):
    net, inputs = quantized("mlp", "w8a32")
    path = tmp_path / "net.onnx"
    export(net, path, inputs, activations="static-signed", calibration=batches(16, 8))
    graph = onnx.load(path).graph
    held = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    zero_points = [held[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(zero_points) == 2
    assert all(each.dtype == "int8" and each == 0 for each in zero_points)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"calibration": []}, "gave no inputs"),
        ({"calibration": [(torch.randn(2, 8), torch.randn(2, 8))]}, "calibration input 0 has 2 tensors"),
        ({"calibration": [torch.full((2, 8), torch.nan)]}, "NaN or infinity"),
        ({"calibration": [torch.zeros(2, 8)]}, "Calibrate with more inputs"),
        ({"calibration": [{"y": torch.ones(2, 8)}]}, "calibration input 0 names 'y', and the inputs are input"),
        ({}, "belong together"),
    ],
)
def test_calibration_that_does_not_fit_is_an_error(tmp_path, given, message):
    net, inputs = quantized("mlp")
    with pytest.raises(ExportError, match=message):
        export(net, tmp_path / "net.onnx", inputs, activations="static", **given)
    assert not list(tmp_path.iterdir())


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, x):
        return {"logits": self.net(x), "kind": "scores"}

    def validation_step(self, batch, index):
        x, y = batch
        self.log("loss", nn.functional.cross_entropy(self(x)["logits"], y))


def validated(model, data):
    trainer = Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    return trainer.validate(model, data, verbose=False)[0]["loss"]


def test_the_users_loop_measures_the_exported_file(tmp_path):
    torch.manual_seed(0)
    model = Classifier()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 8, generator=generator), torch.randint(0, 3, (20,), generator=generator)
    data = DataLoader(list(zip(x, y, strict=True)), batch_size=8)
    in_float = validated(model, data)
    quantize(model, "w8a8")
    here = validated(model, data)
    path = tmp_path / "net.onnx"
    export(model, path, x[:4], activations="static", calibration=x.split(10))
    with session_forward(model, path):
        there = validated(model, data)
    assert "forward" not in vars(model)
    assert there == pytest.approx(here, rel=0.05)
    assert len({in_float, here, there}) == 3
    assert validated(model, data) == here
    with pytest.raises(ExportError, match=r"nothing called Classifier\.forward"), session_forward(model, path):
        model.net(x)
    with pytest.raises(ExportError, match="no such file"), session_forward(model, tmp_path / "other.onnx"):
        model(x)
