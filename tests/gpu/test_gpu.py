"""Layers and runs on a GPU, skipped without one. `tests/gpu/check.sh` runs these and prints times and memory."""

import copy

import pytest
import torch
from lightnings import ModelCheckpoint
from models import Net, keeper, loader, trainer
from torch import nn

from tinyq_lightning import TinyQCallback, load_quantized, quantize
from tinyq_lightning.kernels.integer import has_cuda_product, int_mm
from tinyq_lightning.methods import METHODS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),
]

GPU = "cuda"
# of each output, relative to its norm: rounding of the dtype that is computed in
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

LAYERS = {
    "linear": (nn.Linear(200, 304), (7, 200)),
    "odd linear": (nn.Linear(37, 21), (3, 37)),
    "conv1d": (nn.Conv1d(6, 10, 3, padding=1), (3, 6, 50)),
    "conv2d": (nn.Conv2d(16, 24, 3, stride=2, padding=1), (2, 16, 19, 20)),
    "pointwise": (nn.Conv2d(16, 24, 1), (2, 16, 9, 10)),
    "dilated": (nn.Conv2d(6, 8, 3, dilation=(2, 1), padding="same", padding_mode="reflect"), (2, 6, 12, 13)),
    "groups": (nn.Conv2d(16, 32, 3, groups=4), (2, 16, 9, 10)),
    "conv3d": (nn.Conv3d(4, 8, 2), (2, 4, 5, 6, 7)),
}

OTHERS = {
    "embedding": (nn.Embedding(50, 6), lambda: (torch.arange(12).view(3, 4),)),
    "large table": (nn.Embedding(1100, 1000), lambda: (torch.arange(12).view(3, 4),)),
    "bag": (nn.EmbeddingBag(50, 6, mode="mean"), lambda: (torch.arange(12).view(3, 4),)),
    "lstm": (nn.LSTM(6, 7, num_layers=2, batch_first=True), lambda: (torch.randn(3, 4, 6),)),
    "gru cell": (nn.GRUCell(6, 7), lambda: (torch.randn(3, 6),)),
    "attention": (nn.MultiheadAttention(16, 4), lambda: (torch.randn(5, 2, 16),) * 3),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), lambda: (torch.randn(2, 4, 5, 5),)),
}


def quantized(layer, method, kernel="auto"):
    model = nn.Sequential(copy.deepcopy(layer))
    quantize(model, {"method": method, "kernel": kernel})
    return model.eval()


def error(out, expected):
    out, expected = out.double().cpu(), expected.double()
    return ((out - expected).norm() / expected.norm()).item()


@pytest.fixture(params=[False, True], ids=["float32", "tf32"])
def tf32(request):
    """TF32 as torch has it, and chosen for all products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if request.param else "highest")
    yield request.param
    torch.set_float32_matmul_precision(before)


def test_the_int8_product_is_found_exact():
    assert has_cuda_product()


@pytest.mark.parametrize("rows", [1, 16, 17, 31, 33, 300])
@pytest.mark.parametrize("features", [1, 20, 64, 4096])
def test_sums_of_integers_are_exact(rows, features):
    digits, codes = (torch.randint(-128, 128, (count, features), dtype=torch.int8) for count in (rows, 52))
    expected = digits.double() @ codes.double().T
    assert torch.equal(int_mm(digits.to(GPU), codes.to(GPU)).double().cpu(), expected)
    largest = int_mm(torch.full_like(digits, -128).to(GPU), torch.full_like(codes, 127).to(GPU))
    assert (largest == -128 * 127 * features).all()


@pytest.mark.parametrize("kernel", ["auto", "int8", "reference"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_method_means_the_same_as_on_the_cpu(name, method, kernel, tf32):
    layer, shape = LAYERS[name]
    model, x = quantized(layer, method, kernel), torch.randn(shape)
    with torch.no_grad():
        expected, out = model(x), copy.deepcopy(model).to(GPU)(x.to(GPU))
        if METHODS[method].digits == 1:
            assert torch.equal(out.cpu(), expected), error(out, expected)
        as_they_are = not METHODS[method].rounds and kernel != "int8"
        assert error(out, expected) < (2e-3 if as_they_are and (tf32 or layer in CONVOLUTIONS) else 1e-5)


CONVOLUTIONS = [layer for layer, _ in LAYERS.values() if not isinstance(layer, nn.Linear)]  # cuDNN takes TF32 unasked


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["w8a32", "w8a16", "w8a8", "w4a16"])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_half_precision_and_autocast_round_the_result_alone(name, method, dtype):
    layer, shape = LAYERS[name]
    model, x = quantized(layer, method), torch.randn(shape).to(dtype)
    with torch.no_grad():
        expected, on_gpu = model(x.float()), copy.deepcopy(model).to(GPU)
        out = on_gpu(x.to(GPU))
        with torch.autocast(GPU, dtype=dtype):
            under_autocast = on_gpu(x.float().to(GPU))
    for each in (out, under_autocast):
        assert each.dtype == dtype
        assert error(each, expected) < BOUNDS[dtype]


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_give_what_they_give_on_the_cpu(name):
    layer, inputs = OTHERS[name]
    model, given = quantized(layer, "w8a32")[0], inputs()
    with torch.no_grad():
        expected, out = model(*given), copy.deepcopy(model).to(GPU)(*(each.to(GPU) for each in given))
    first, wanted = (each[0] if isinstance(each, tuple) else each for each in (out, expected))
    assert error(first, wanted) < 2e-3


@pytest.mark.parametrize("bits", ["w8a32", "w4a32"])
def test_codes_made_on_the_gpu_are_those_made_on_the_cpu(bits):
    layer = nn.Sequential(nn.Linear(300, 200))
    on_gpu = copy.deepcopy(layer).to(GPU)
    for model in (layer, on_gpu):
        quantize(model, bits)
    for name, value in layer.state_dict().items():
        assert torch.equal(on_gpu.state_dict()[name].cpu(), value), name


@pytest.mark.parametrize("method", ["w8a32", "w8a16", "w8a8"])
def test_gradients_are_those_of_the_cpu(method):
    for layer, shape in (LAYERS["linear"], LAYERS["conv2d"]):
        model, x = quantized(layer, method), torch.randn(shape)
        gradients = []
        for device in ("cpu", GPU):
            given = x.to(device).requires_grad_()
            copy.deepcopy(model).to(device)(given).square().sum().backward()
            gradients.append(given.grad)
        assert error(gradients[1], gradients[0]) < 2e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LAYERS)
def test_no_call_waits_for_the_gpu(name, method):
    layer, shape = LAYERS[name]
    model, x = quantized(layer, method).to(GPU), torch.randn(shape, device=GPU)
    with torch.no_grad():
        model(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", ["w8a32", "w8a16", "w8a8"])
def test_a_call_can_be_recorded_as_a_cuda_graph(method):
    model, x = quantized(nn.Linear(64, 64), method).to(GPU), torch.randn(40, 64, device=GPU)
    with torch.no_grad():
        expected, side = model(x), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.parametrize("method", ["w8a32", "w8a16", "w8a8"])
@pytest.mark.parametrize("name", ["odd linear", "conv2d"])
def test_compiled_layers_give_the_same_numbers(name, method):
    pytest.importorskip("triton")
    layer, shape = LAYERS[name]
    model, x = quantized(layer, method).to(GPU), torch.randn(shape, device=GPU)
    with torch.no_grad():
        # a compiled division may differ in the last bit, and then an activation goes to the next step
        assert error(torch.compile(model)(x), model(x).cpu()) < (1e-2 if METHODS[method].digits == 1 else 2e-3)


def test_a_layer_holds_one_byte_a_weight():
    before = torch.cuda.memory_allocated()
    model = quantized(nn.Linear(4096, 4096, bias=False), "w8a8").to(GPU)
    x = torch.randn(64, 4096, device=GPU)
    with torch.no_grad():
        model(x)
    del x
    assert torch.cuda.memory_allocated() - before < 1.1 * 4096 * 4096


class Watching(Net):
    """Notes where validation computes, and how much of the GPU's memory is taken then."""

    def __init__(self, width=512):
        super().__init__(width)
        self.seen = []

    def validation_step(self, batch, batch_idx):
        layers = [each for each in self.modules() if hasattr(each, "bias")]
        self.seen.append({batch[0].device.type, *(each.bias.device.type for each in layers if each.bias is not None)})
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("method", ["w8a32", "w8a8", "w4a8"])
def test_a_fit_measures_on_the_gpu_and_leaves_a_file_for_any_device(method, precision, tmp_path):
    module, callback = Watching(), TinyQCallback(method, report="full", strict=True)
    run = trainer(tmp_path, keeper(tmp_path), callback, accelerator="gpu", precision=precision)
    run.fit(module, loader(shuffle=True), loader(seed=1))
    assert all(devices == {GPU} for devices in module.seen)
    assert callback.error is None
    assert all(len(values) == 3 for values in callback.results.values())
    x = next(iter(loader(seed=1)))[0]
    outs = [load_quantized(callback.quantized_path, Net).to(device)(x.to(device)) for device in ("cpu", GPU)]
    assert error(outs[1], outs[0].detach()) < 2e-3


def test_a_test_run_quantizes_on_the_gpu(tmp_path):
    module, callback = Net(), TinyQCallback("w8a8", when="test_start", strict=True)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    run = trainer(tmp_path, callback, accelerator="gpu")
    run.test(module, loader(seed=2), verbose=False)
    assert callback.results
    assert all(torch.equal(value.cpu(), before[name]) for name, value in module.state_dict().items())
    assert {each.device.type for each in load_quantized(callback.quantized_path, Net).buffers()} == {"cpu"}


def test_never_slower_calibration_and_a_budget_run_on_the_gpu(tmp_path):
    best = ModelCheckpoint(dirpath=tmp_path, monitor="val_acc", mode="max")
    callback = TinyQCallback(
        "w4a8", never_slower=True, calibrate=4, monitor="val_acc", mode="max", max_drop=0.05, strict=True
    )
    run = trainer(tmp_path, best, callback, accelerator="gpu")
    run.fit(Net(), loader(shuffle=True), loader(seed=1))
    assert callback.quantized_path
