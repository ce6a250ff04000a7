"""Runtimes that round activations on their own, beside models that make much of small differences."""

import pytest
import torch
from exported_nets import needs_onnx
from torch import nn

from tinyq_lightning import export, quantize
from tinyq_lightning.errors import ExportError

pytestmark = needs_onnx


class Bins(nn.Module):
    """Looks up the bins that its values fall into."""

    def __init__(self):
        super().__init__()
        self.layer, self.embed = nn.Linear(8, 32), nn.Embedding(512, 4)
        self.register_buffer("edges", torch.linspace(-2, 2, 511))

    def forward(self, x):
        return self.embed(torch.bucketize(self.layer(x), self.edges)).flatten(1)


class Angles(nn.Module):
    """Sines of large numbers."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.head(torch.sin(500 * self.layer(x)))


class Hours(nn.Module):
    """Looks up an hour by an input that is a point in time."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(24, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.embed(torch.remainder(x.abs() * 1000, 24).floor().long()).mean(1))


NETS = {each.__name__.lower(): each for each in (Bins, Angles, Hours)}


def quantized(name, method="w8a32"):
    torch.manual_seed(0)
    net = NETS[name]().eval()
    quantize(net, method)
    return net, torch.randn(32, 8)


def says(text, setting):
    return setting in text and "argmax" in text and "rounds on its own" in text


def is_told(report, setting):
    """What is near the model on this processor, where the runtime may round nothing, needs no note."""
    return report.relative_error <= report.max_error or says(report.notes[0], setting)


@pytest.mark.parametrize("name", ["bins", "angles"])
def test_a_right_file_is_written_with_a_note_on_the_runtime(tmp_path, name):
    net, x = quantized(name)
    assert is_told(export(net, tmp_path / "net.onnx", x), "session.qdq_matmulnbits_accuracy_level = 1")
    assert (tmp_path / "net.onnx").exists()


def test_a_bound_that_was_given_holds_as_the_runtime_computes_by_default(tmp_path):
    net, x = quantized("bins")
    try:
        export(net, tmp_path / "net.onnx", x, max_error=1e-5)
    except ExportError as error:
        told = str(error)
    else:
        pytest.skip("ONNX Runtime rounds no activations on this processor")
    assert "no file was left" in told
    assert says(told, "session.qdq_matmulnbits_accuracy_level = 1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NETS)
def test_openvino_takes_each_on_every_processor(tmp_path, name):
    pytest.importorskip("openvino")
    net, x = quantized(name)
    assert is_told(export(net, tmp_path / "net.xml", x), "INFERENCE_PRECISION_HINT = f32")


def test_weights_alone_are_the_reason_where_layers_round_and_the_format_does_not(tmp_path):
    pytest.importorskip("openvino")
    net, x = quantized("bins", "w8a8")
    with pytest.raises(ExportError, match="as w8a8 say: quantize with methods that end in a32"):
        export(net, tmp_path / "net.xml", x)


class Otherwise(Angles):
    """Is another model where it is traced."""

    def forward(self, x):
        return super().forward(x) * (2 if torch.compiler.is_exporting() else 1)


def test_a_file_of_another_model_is_refused_without_a_word_on_rounding(tmp_path):
    net, x = Otherwise().eval(), torch.randn(32, 8)
    quantize(net, "w8a32")
    with pytest.raises(ExportError, match="no file was left") as caught:
        export(net, tmp_path / "net.onnx", x)
    assert "on its own" not in str(caught.value)
