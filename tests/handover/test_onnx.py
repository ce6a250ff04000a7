"""ONNX files: standard operators on int8 codes, run by ONNX Runtime and OpenVINO as the model runs here."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from exported_nets import NETS
from torch import nn

from tinyq_lightning import export, quantize
from tinyq_lightning.errors import ExportError
from tinyq_lightning.handover import session_forward

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.skipif(not hasattr(torch.onnx, "ops"), reason="needs torch 2.8")

WEIGHT_ONLY = ("mlp", "padded", "resnet", "unet", "tied")
CLOSE = 2e-5


def quantized(name, method="w8a8"):
    torch.manual_seed(0)
    net, inputs, dynamic = NETS[name]()
    spec = {"method": method}
    if name == "experts":
        spec["rules"] = [{"match": "experts", "method": "w8a32"}]
    quantize(net.eval(), spec)
    return net, inputs, dynamic


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function: the net, the report and the path of an export, which is made once."""
    found = {}

    def make(name, method="w8a8"):
        if (name, method) not in found:
            net, inputs, dynamic = quantized(name, method)
            path = tmp_path_factory.mktemp(f"{name}-{method}") / "net.onnx"
            found[name, method] = net, export(net, path, inputs, dynamic=dynamic, max_error=0.05), path
        return found[name, method]

    return make


def graph_of(path):
    return onnx.load(path).graph


def operators(graph):
    return [node.op_type for node in graph.node]


def initializers(graph, kind="INT8"):
    return [each for each in graph.initializer if onnx.TensorProto.DataType.Name(each.data_type) == kind]


def run(path, *inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return session.run(None, {name: each.numpy() for name, each in zip(names, inputs, strict=True)})


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "w8a8") for name in NETS), ("padded", "w8a16"), ("unet", "w8a16")]
)
def test_every_net_computes_the_same_numbers_for_every_size(made, name, method):
    _, report, _ = made(name, method)
    assert report.format == "onnx"
    assert len(report.inputs) == 3
    assert report.relative_error < CLOSE


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_weight_only_layers_are_as_near_as_the_runtime_rounds(made, name):
    _, report, _ = made(name, "w8a32")
    assert report.relative_error < 0.03
    assert any("qdq_matmulnbits_accuracy_level" in note for note in report.notes) == (name != "unet")
    assert any("disable_quant_qdq" in note for note in report.notes)


def test_the_session_option_of_the_note_keeps_activations_in_float32(tmp_path):
    net, inputs, _ = quantized("mlp", "w8a32")
    export(net, tmp_path / "net.onnx", inputs)
    errors = {}
    for level in ("4", "1"):
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
        session = onnxruntime.InferenceSession(tmp_path / "net.onnx", options, providers=["CPUExecutionProvider"])
        out = torch.from_numpy(session.run(None, {"input": inputs.numpy()})[0])
        errors[level] = ((out - net(inputs)).norm() / out.norm()).item()
    assert errors["1"] < 1e-6
    if errors["4"] < 1e-6:
        pytest.skip("this onnxruntime keeps the activations of such a layer in float32 in any case")


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "w8a8") for name in NETS), *((name, "w8a32") for name in WEIGHT_ONLY)]
)
def test_files_hold_codes_and_standard_operators_alone(made, name, method):
    net, _, path = made(name, method)
    model = onnx.load(path)
    assert [each.domain for each in model.opset_import] == [""]
    assert not model.functions
    assert not {"Gemm", "BatchNormalization"} & set(operators(model.graph))
    held = sum(np.prod(each.dims) for each in initializers(model.graph))
    codes = {tensor.data_ptr(): tensor.numel() for tensor in net.state_dict().values() if tensor.dtype == torch.int8}
    assert held == sum(codes.values())
    assert not [each.name for each in initializers(model.graph, "FLOAT") if len(each.dims) > 2]
    content = path.read_bytes()
    for word in (b"tinyq", b"/site-packages/", b".py"):
        assert word not in content


def test_dimensions_inputs_and_outputs_have_names(made):
    graph = graph_of(made("padded")[2])

    def shapes(values):
        return {
            each.name: [dim.dim_param or dim.dim_value for dim in each.type.tensor_type.shape.dim] for each in values
        }

    assert shapes(graph.input) == {"ids": ["batch", "tokens"], "padding": ["batch", "tokens"]}
    assert shapes(graph.output) == {"hidden": ["batch", "tokens", 16], "logits": ["batch", 3]}


@pytest.mark.parametrize(("method", "products"), [("w8a8", 1), ("w8a16", 2)])
def test_products_are_of_uint8_digits_with_the_zero_point_128(made, method, products):
    graph = graph_of(made("padded", method)[2])
    found = [node for node in graph.node if node.op_type == "MatMulInteger"]
    assert len(found) == (2 * 4 + 1) * products
    assert all(node.input[2] == found[0].input[2] for node in found)
    zero_point = next(each for each in graph.initializer if each.name == found[0].input[2])
    assert onnx.numpy_helper.to_array(zero_point) == np.uint8(128)


def test_weight_only_layers_are_matmul_and_add_of_columns(made):
    graph = graph_of(made("padded", "w8a32")[2])
    scaled = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    assert len(scaled) == 2 * 4 + 1
    assert {node.attribute[0].i for node in scaled} == {1}
    assert operators(graph).count("MatMul") == len(scaled) + 2 * 2  # and those of attention itself


@pytest.mark.parametrize("method", ["w8a16", "w8a8"])
def test_rows_that_are_not_finite_stay_so_and_zeros_are_zeros(tmp_path, method):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 8, bias=False))
    quantize(net, method)
    export(net, tmp_path / "net.onnx", torch.randn(6, 40))
    x = torch.randn(6, 40)
    x[1, 20], x[2, 5], x[3], x[5] = torch.nan, -torch.inf, 0, 1e-38
    (out,) = run(tmp_path / "net.onnx", x)
    wanted = net(x).detach().numpy()
    assert not np.isfinite(out[1:3]).any()
    assert (out[3] == 0).all()
    np.testing.assert_allclose(out[[0, 4, 5]], wanted[[0, 4, 5]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["w8a8", "w8a32"])
def test_ties_are_one_initializer(made, method):
    graph = graph_of(made("tied", method)[2])
    assert sorted(tuple(each.dims) for each in initializers(graph)) == [(16, 16), (40, 16)]


def test_layers_that_share_a_weight_share_it_in_the_file(tmp_path):
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    net[2].weight = net[0].weight
    quantize(net, "w8a8")
    export(net, tmp_path / "net.onnx", torch.randn(3, 16))
    assert len(initializers(onnx.load(tmp_path / "net.onnx").graph)) == 1


@pytest.mark.parametrize(
    ("dtype", "method"),
    [(torch.float16, "w8a8"), (torch.bfloat16, "w8a32"), (torch.float64, "w8a8"), (torch.float64, "w8a32")],
)
def test_other_dtypes_come_out_as_they_do_here(tmp_path, dtype, method):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 4)).to(dtype)
    quantize(net, method)
    if dtype == torch.bfloat16:  # which NumPy has not: in between only
        net = nn.Sequential(Cast(dtype), net, Cast(torch.float32))
    report = export(net, tmp_path / "net.onnx", torch.randn(5, 24, dtype=dtype if dtype != torch.bfloat16 else None))
    assert report.relative_error < 0.02


class Cast(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_a_runtime_cannot_compute_in_a_dtype_is_an_error_with_advice(tmp_path, dtype):
    net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)).to(dtype)
    quantize(net, "w8a8")
    with pytest.raises(ExportError, match=rf"computes in {dtype}.*export model\.float\(\)"):
        export(net, tmp_path / "net.onnx", torch.randn(3, 16).to(dtype))
    assert not list(tmp_path.iterdir())


def test_weights_beyond_what_one_file_holds_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr("tinyq_lightning.handover.onnx_graph._LARGEST_FILE", 100)
    net, inputs = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)), torch.randn(5, 16)
    quantize(net, "w8a8")
    report = export(net, tmp_path / "net.onnx", inputs)
    assert report.files == (str(tmp_path / "net.onnx"), str(tmp_path / "net.onnx.data"))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    assert report.bytes == sum(each.stat().st_size for each in tmp_path.iterdir())
    assert any(each.external_data for each in onnx.load(report.path, load_external_data=False).graph.initializer)
    np.testing.assert_allclose(run(tmp_path / "net.onnx", inputs)[0], net(inputs).detach(), rtol=1e-4, atol=1e-5)
    static = export(
        net, tmp_path / "static.onnx", inputs, activations="static", calibration=[inputs, inputs], max_error=0.3
    )
    assert len(static.files) == 2
    with pytest.raises(ExportError, match=r"there is such a file already"):
        export(net, tmp_path / "net.onnx", inputs)


class Bag(nn.Module):
    """Bags that begin at offsets, some of them empty, with weights where they are sums."""

    def __init__(self, mode, padding_idx, include_last_offset):
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 4, None, 2.0, False, mode, False, None, include_last_offset, padding_idx)

    def forward(self, ids, offsets, weights=None):
        return self.bag(ids, offsets, weights)


@pytest.mark.parametrize("ending", ["onnx", "xml"])
@pytest.mark.parametrize(("mode", "padding", "last"), [("sum", 3, False), ("mean", 3, True), ("max", None, False)])
def test_bags_of_any_number_and_length_work(tmp_path, mode, padding, last, ending):
    pytest.importorskip("openvino")
    net, path = Bag(mode, padding, last).eval(), tmp_path / f"net.{ending}"
    quantize(net, "w8a32")

    def inputs(count, offsets):
        ids = torch.randint(0, 20, (count,), generator=torch.Generator().manual_seed(count))
        given = {"ids": ids, "offsets": torch.tensor([*offsets, *[count] * last])}
        return given | ({"weights": torch.rand(count)} if mode == "sum" else {})

    dynamic = {"ids": {0: "n"}, "offsets": {0: "bags"}} | ({"weights": {0: "n"}} if mode == "sum" else {})
    export(net, path, inputs(9, [0, 2, 2, 7]), dynamic=dynamic, max_error=CLOSE)
    other = inputs(17, [0, 4, 5, 5, 11, 12])
    with session_forward(net, path):
        found = net(**other)
    torch.testing.assert_close(found, net(**other), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_projected_lstm_is_refused(tmp_path):
    net = nn.Sequential(nn.LSTM(6, 8, proj_size=3))
    quantize(net, "w8a32")
    kinds = {type(module) for module in net.modules()}
    with pytest.raises(ExportError, match="proj_size"):
        export(net, tmp_path / "net.onnx", torch.randn(4, 2, 6))
    assert not list(tmp_path.iterdir())
    assert {type(module) for module in net.modules()} == kinds


def test_layers_are_of_their_own_classes_again(tmp_path):
    net, inputs, dynamic = quantized("padded")
    before = [type(module) for module in net.modules()]
    out = net(*inputs)["logits"]
    export(net, tmp_path / "net.onnx", inputs, dynamic=dynamic)
    assert [type(module) for module in net.modules()] == before
    assert torch.equal(net(*inputs)["logits"], out)


def test_an_older_torch_is_an_error_that_says_so(tmp_path, monkeypatch):
    monkeypatch.delattr(torch.onnx, "ops")
    net, inputs, _ = quantized("mlp")
    with pytest.raises(ExportError, match=r"torch 2\.8"):
        export(net, tmp_path / "net.onnx", inputs)


FOUR = {
    "linear": lambda: (nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8)), torch.randn(3, 64)),
    "conv": lambda: (nn.Sequential(nn.Conv2d(32, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), torch.randn(2, 32, 5, 5)),
    "tied": lambda: (wide_tied(), torch.randint(0, 40, (3, 5))),
}


def wide_tied():
    net = NETS["tied"]()[0]
    net.embed, net.middle, net.out = nn.Embedding(40, 64), nn.Linear(64, 64), nn.Linear(64, 40)
    net.out.weight = net.embed.weight
    return net


@pytest.mark.parametrize("method", ["w4a32", "w4a8"])
@pytest.mark.parametrize("name", FOUR)
def test_codes_of_four_bits_are_int4_where_rows_are_whole_groups(tmp_path, name, method):
    torch.manual_seed(0)
    net, inputs = FOUR[name]()
    quantize(net.eval(), method)
    report = export(net, tmp_path / "net.onnx", inputs)
    assert report.relative_error < (0.02 if method == "w4a32" else CLOSE)
    graph = graph_of(tmp_path / "net.onnx")
    packed = [tuple(each.dims) for each in initializers(graph, "INT4")]
    whole = [each for each in initializers(graph) if len(each.dims) > 1]
    assert (
        sum(np.prod(each) for each in packed) == {"linear": 64 * 48, "conv": 8 * 32 * 9, "tied": 64 * (64 + 40)}[name]
    )
    assert sum(np.prod(each.dims) for each in whole) == {"linear": 48 * 8, "conv": 8 * 4, "tied": 0}[name]
    blocks = [node for node in graph.node if any(each.name == "block_size" for each in node.attribute)]
    assert len(blocks) == {"linear": 1, "conv": 0, "tied": 1}[name] * (method == "w4a32")


def test_openvino_runs_a_file_with_codes_of_four_bits(tmp_path):
    openvino = pytest.importorskip("openvino")
    torch.manual_seed(0)
    net, inputs = FOUR["linear"]()
    quantize(net.eval(), "w4a32")
    export(net, tmp_path / "net.onnx", inputs)
    assert export(net, tmp_path / "net.xml", inputs).relative_error < 0.05
    core = openvino.Core()
    properties = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "INFERENCE_PRECISION_HINT": "f32"}
    for name in ("net.onnx", "net.xml"):
        out = core.compile_model(tmp_path / name, "CPU", properties)([inputs.numpy()])[0]
        torch.testing.assert_close(torch.from_numpy(out), net(inputs), rtol=1e-4, atol=1e-5)
    constants = [each for each in core.read_model(tmp_path / "net.xml").get_ops() if each.get_type_name() == "Constant"]
    assert sum(torch.Size(each.get_output_shape(0)).numel() for each in constants if is_int4(each)) == 64 * 48


def is_int4(constant):
    return constant.get_element_type().get_type_name() == "i4"


ALONE = """
import json, sys
sys.modules.update(dict.fromkeys(("tinyq_lightning", "torch", "lightning")))
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
ids = numpy.arange(1, 9).reshape(2, 4)
out = session.run(["logits"], {"ids": ids, "padding": ids == 8})
print(json.dumps(out[0].tolist()))
"""


def test_a_process_without_this_package_runs_the_file(made):
    net, _, path = made("padded")
    found = subprocess.run([sys.executable, "-c", ALONE, path], capture_output=True, text=True, check=True)
    ids = torch.arange(1, 9).view(2, 4)
    net.encoder.enable_nested_tensor = False
    torch.testing.assert_close(
        torch.tensor(json.loads(found.stdout)), net(ids, ids == 8)["logits"], rtol=1e-4, atol=1e-5
    )
