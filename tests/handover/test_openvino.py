"""OpenVINO's files: int8 constants, run by OpenVINO, also in a process without this package."""

import json
import subprocess
import sys

import pytest
import torch
from exported_nets import NETS

from tinyq_lightning import export, quantize

openvino = pytest.importorskip("openvino")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.skipif(not hasattr(torch.onnx, "ops"), reason="needs torch 2.8")


def quantized(name, method):
    torch.manual_seed(0)
    net, inputs, dynamic = NETS[name]()
    quantize(net.eval(), {"method": method, "rules": [{"match": "experts", "method": "w8a32"}] * (name == "experts")})
    return net, inputs, dynamic


@pytest.mark.parametrize("name", NETS)
def test_every_net_is_as_near_as_the_runtime_rounds(tmp_path, name):
    net, inputs, dynamic = quantized(name, "w8a32")
    report = export(net, tmp_path / "net.xml", inputs, dynamic=dynamic)
    assert report.format == "openvino"
    assert [name.rpartition(".")[2] for name in report.files] == ["xml", "bin"]
    assert report.relative_error < 0.05
    assert any("DYNAMIC_QUANTIZATION_GROUP_SIZE" in note for note in report.notes)
    codes = {tensor.data_ptr(): tensor.numel() for tensor in net.state_dict().values() if tensor.dtype == torch.int8}
    weights = openvino.Core().read_model(tmp_path / "net.xml").get_ops()
    held = [each.get_output_shape(0) for each in weights if each.get_type_name() == "Constant" and is_int8(each)]
    assert sum(torch.Size(shape).numel() for shape in held) == sum(codes.values())


def is_int8(constant):
    return constant.get_element_type() == openvino.Type.i8 and torch.Size(constant.get_output_shape(0)).numel() > 1


def test_the_properties_of_the_notes_keep_activations_as_they_are(tmp_path):
    net, inputs, dynamic = quantized("mlp", "w8a32")
    export(net, tmp_path / "net.xml", inputs, dynamic=dynamic)
    properties = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(tmp_path / "net.xml", "CPU", properties)
    torch.testing.assert_close(torch.from_numpy(compiled([inputs.numpy()])[0]), net(inputs), rtol=1e-4, atol=1e-5)


ALONE = """
import json, sys
sys.modules.update(dict.fromkeys(("tinyq_lightning", "torch", "lightning", "onnx")))
import numpy, openvino
compiled = openvino.Core().compile_model(sys.argv[1], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
print(json.dumps(compiled([numpy.linspace(-1, 1, 16, dtype="float32").reshape(2, 8)])[0].tolist()))
"""


def test_a_process_without_this_package_runs_the_files(tmp_path):
    net, inputs, dynamic = quantized("mlp", "w8a8")
    export(net, tmp_path / "net.xml", inputs, dynamic=dynamic)
    found = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "net.xml"], capture_output=True, text=True, check=True
    )
    wanted = net(torch.linspace(-1, 1, 16).view(2, 8))
    torch.testing.assert_close(torch.tensor(json.loads(found.stdout)), wanted, rtol=0.05, atol=0.01)
