"""Layers on a GPU that fake tensors play: where each operator computes, in which dtype, and what it is given."""

import copy

import pytest
import torch
from fake_gpu import GPU, Watched, fake_gpu, needs_compiler
from torch import nn

from tinyq_lightning import quantize
from tinyq_lightning.kernels.convolution import _input_gradient
from tinyq_lightning.kernels.gradient import input_gradient
from tinyq_lightning.methods import METHODS

plays = torch.version.cuda is None or torch.cuda.is_available() or hasattr(torch.onnx, "ops")
pytestmark = [needs_compiler, pytest.mark.skipif(not plays, reason="fake tensors of torch 2.7 ask the driver")]

ROUNDING = [name for name, method in METHODS.items() if method.rounds]
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "linear")

CONVOLUTIONS = {
    "1d": (nn.Conv1d(3, 5, 3, padding=1), (2, 3, 11)),
    "2d": (nn.Conv2d(8, 12, 3, stride=2, padding=1), (2, 8, 9, 10)),
    "pointwise": (nn.Conv2d(8, 16, 1, stride=2), (2, 8, 9, 10)),
    "dilated": (nn.Conv2d(4, 6, (3, 5), dilation=(2, 1), padding="same"), (2, 4, 9, 10)),
    "circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 9, 10)),
    "3d": (nn.Conv3d(2, 4, 2), (1, 2, 4, 5, 6)),
    "groups": (nn.Conv2d(8, 16, 3, groups=4), (2, 8, 9, 10)),
    "channels last": (nn.Conv2d(8, 12, 3).to(memory_format=torch.channels_last), (2, 8, 9, 10)),
}

OTHERS = {
    "embedding": (nn.Embedding(50, 6), lambda: (torch.zeros(3, 4, dtype=torch.long, device=GPU),)),
    "bag": (nn.EmbeddingBag(50, 6, mode="mean"), lambda: (torch.zeros(3, 4, dtype=torch.long, device=GPU),)),
    "large table": (nn.Embedding(1100, 1000), lambda: (torch.zeros(3, 4, dtype=torch.long, device=GPU),)),
    "lstm": (nn.LSTM(6, 7, batch_first=True), lambda: (torch.zeros(3, 4, 6, device=GPU),)),
    "attention": (nn.MultiheadAttention(16, 4), lambda: (torch.zeros(5, 2, 16, device=GPU),) * 3),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), lambda: (torch.zeros(2, 4, 5, 5, device=GPU),)),
}


class ProductsOf(Watched):
    """Also refuses products of floats that TF32 would change."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in PRODUCTS:
            given = [each for each in args if isinstance(each, torch.Tensor)]
            assert {each.dtype for each in given} == {torch.float64}, f"{name} of {given[0].dtype}"
        return super().__torch_dispatch__(func, types, args, kwargs)


def quantized(layer, method, kernel="auto"):
    model = nn.Sequential(copy.deepcopy(layer))
    quantize(model, {"method": method, "kernel": kernel})
    return model


@pytest.mark.parametrize("kernel", ["auto", "compact", "int8", "reference"])
@pytest.mark.parametrize("method", METHODS)
def test_linear_layers_stay_on_the_gpu(method, kernel, monkeypatch):
    model = quantized(nn.Linear(20, 30), method, kernel)
    for rows, dtype in ((0, torch.float32), (1, torch.float32), (17, torch.bfloat16), (1, torch.float16)):
        with fake_gpu(monkeypatch, model) as on_gpu, Watched():
            x = torch.empty(2, rows, 20, device=GPU, dtype=dtype, requires_grad=True)
            out = on_gpu(x)
            assert (out.device, out.dtype, out.shape) == (GPU, dtype, (2, rows, 30))


@pytest.mark.parametrize("exact_product", [True, False])
@pytest.mark.parametrize("kernel", ["auto", "int8", "reference"])
@pytest.mark.parametrize("method", ROUNDING)
def test_no_product_of_rounded_activations_can_be_changed_by_tf32(method, kernel, exact_product, monkeypatch):
    linear, (conv, shape) = nn.Linear(20, 30), CONVOLUTIONS["2d"]
    inputs = {linear: (5, 20), conv: shape}
    for layer in inputs:
        model = quantized(layer, method, kernel)
        with fake_gpu(monkeypatch, model, exact_product) as on_gpu, ProductsOf() as watched, torch.no_grad():
            on_gpu(torch.empty(inputs[layer], device=GPU))
        assert watched.counts["_int_mm"] == (exact_product and kernel != "reference")


@pytest.mark.parametrize("method", ["w8a32", "w8a16", "w8a8", "w4a8"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_stay_on_the_gpu(name, method, monkeypatch):
    layer, shape = CONVOLUTIONS[name]
    expected = layer(torch.zeros(shape))
    for dtype in (torch.float32, torch.bfloat16):
        with fake_gpu(monkeypatch, quantized(layer, method)) as on_gpu, Watched():
            out = on_gpu(torch.empty(shape, device=GPU, dtype=dtype, requires_grad=True))
            assert (out.device, out.dtype, out.shape) == (GPU, dtype, expected.shape)


def test_digits_and_codes_are_given_by_rows_from_even_addresses(monkeypatch):
    attention = quantized(nn.MultiheadAttention(24, 4), "w8a8")
    linear = quantized(nn.Linear(24, 40), "w8a8")
    with fake_gpu(monkeypatch, linear) as on_gpu, Watched():
        assert on_gpu(torch.empty(24, 64, device=GPU).t()).shape == (64, 40)
    with fake_gpu(monkeypatch, attention) as on_gpu, Watched():
        query, key, value = torch.empty(3, 5, 2, 24, device=GPU)
        assert on_gpu[0](query, key, value)[0].device == GPU


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_stay_on_the_gpu(name, monkeypatch):
    if name == "lstm" and torch.version.cuda and not torch.cuda.is_available():
        pytest.skip("torch built for CUDA asks the driver for cuDNN before its LSTM, and there is none")
    layer, inputs = OTHERS[name]
    with fake_gpu(monkeypatch, quantized(layer, "w8a32")) as on_gpu, Watched():
        out = on_gpu[0](*inputs())
        first = out[0] if isinstance(out, tuple) else out
        assert first.device == GPU


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_what_activations_as_they_are_are_multiplied_in(dtype, monkeypatch):
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", dtype)
    torch.set_autocast_enabled("cuda", True)  # torch.autocast asks for a GPU
    try:
        with fake_gpu(monkeypatch, quantized(nn.Linear(20, 30), "w8a32")) as on_gpu:
            assert on_gpu(torch.empty(5, 20, device=GPU)).dtype == dtype
        with fake_gpu(monkeypatch, quantized(nn.Linear(20, 30), "w8a16")) as on_gpu, ProductsOf() as watched:
            assert on_gpu(torch.empty(5, 20, device=GPU)).dtype == dtype
            assert watched.counts["_int_mm"] == 1
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)


def test_gradients_stay_on_the_gpu(monkeypatch):
    conv, shape = CONVOLUTIONS["2d"]
    model = nn.Sequential(quantized(nn.Linear(20, 30), "w8a8")[0], quantized(conv, "w8a8")[0])
    geometry, _ = model[1]._moves_of(None, None)
    for dtype in (torch.float32, torch.bfloat16):
        with fake_gpu(monkeypatch, model) as on_gpu, Watched():
            linear, convolution = on_gpu
            grad = torch.empty(5, 30, device=GPU, dtype=dtype)
            of_x = input_gradient(grad, linear.int8_weights, linear.scales)
            assert (of_x.device, of_x.dtype, of_x.shape) == (GPU, dtype, (5, 20))
            grad = torch.empty(2, 12, 5, 5, device=GPU, dtype=dtype)
            codes, scales = convolution.int8_weights, convolution.scales
            of_x = _input_gradient(grad, torch.Size(shape), codes, scales, geometry)
            assert (of_x.device, of_x.dtype, of_x.shape) == (GPU, dtype, shape)


@pytest.mark.parametrize("method", ["w8a32", "w8a16"])
def test_a_graph_holds_the_products_of_the_gpu(method, monkeypatch):
    conv, shape = CONVOLUTIONS["2d"]
    for layer, size in ((nn.Linear(20, 30), (5, 20)), (conv, shape)):
        graphs = []

        def backend(graph, inputs, graphs=graphs):
            graphs.append(graph)
            return graph.forward

        with fake_gpu(monkeypatch, quantized(layer, method)) as on_gpu, torch.no_grad():
            out = torch.compile(on_gpu, backend=backend, fullgraph=True)(torch.empty(size, device=GPU))
            assert out.device == GPU
        products = sum("_int_mm" in str(node.target) for node in graphs[0].graph.nodes)
        assert products == METHODS[method].rounds


def test_packed_codes_are_expanded_on_the_gpu(monkeypatch):
    with fake_gpu(monkeypatch, quantized(nn.Linear(40, 30), "w4a8", "compact")) as on_gpu, Watched() as watched:
        layer = on_gpu[0]
        out = layer.form("int4").product(METHODS["w4a8"], torch.empty(5, 40, device=GPU), layer.scales, layer.bias)
        assert out.device == GPU
        assert watched.counts["_int_mm"] == 1
