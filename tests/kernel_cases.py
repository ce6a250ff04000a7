"""Layers, inputs and fixtures for tests of kernels and of the layers that use them."""

import pytest
import torch
from torch import nn

from tinyq_lightning.kernels import fixed_point, float16, float32, int8, integer
from tinyq_lightning.kernels.float16 import has_float16_product
from tinyq_lightning.kernels.formula import quantized_linear
from tinyq_lightning.kernels.weights import dequantize
from tinyq_lightning.layers.linear import LAYERS
from tinyq_lightning.methods import METHODS

LARGE = (700, 1100)  # out, in: not too small for any kernel
EXACT_CODES = 63  # products of such codes with any digit stay below 2¹⁵ in pairs, so no processor saturates

EIGHT_BITS = [name for name, method in METHODS.items() if method.bits == 8]
each_method = pytest.mark.parametrize("method", EIGHT_BITS)  # with four bits, kernels see the same kind of codes
int8_only = pytest.mark.parametrize("kernel", ["int8", "int8-packed"], indirect=True)


@pytest.fixture(params=["int8", "int8-packed", "float16", "float32"])
def kernel(request, monkeypatch):
    """Each kernel in turn; the int8 ones also without VNNI, where small codes cannot saturate their products."""
    monkeypatch.setenv("TINYQ_KERNEL", request.param.removesuffix("-packed"))
    if request.param.startswith("int8"):
        with_products(monkeypatch, has_plain=True, has_onednn=True, has_fbgemm=True)
    if request.param == "int8-packed":
        if not hasattr(torch.ops.onednn, "qlinear_prepack"):
            pytest.skip("torch was built without oneDNN's int8 product")
        monkeypatch.setattr(int8, "_PACKED_FROM", 0)
    if request.param == "float16" and not has_float16_product():
        pytest.skip("no float16 product on this processor")
    return request.param


def random_layer(method, rows, columns, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = LAYERS[method](columns, rows, bias=bias)
    layer.int8_weights = torch.randint(-EXACT_CODES, EXACT_CODES + 1, (rows, columns), generator=generator).to(
        torch.int8
    )
    layer.scales = torch.rand(rows, generator=generator) * 0.01 + 0.001
    if bias:
        layer.bias = torch.randn(rows, generator=generator)
    return layer


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(layer, x):
    out = x.double() @ dequantize(layer.int8_weights, layer.scales, torch.float64).T
    return out if layer.bias is None else out + layer.bias.double()


def relative_error(out, expected):
    return ((out.double() - expected).norm() / expected.norm()).item()


def median_errors_of_w8a32(shapes, batches, mean=0):
    """Of our layers and of float32 ``linear``; activations and codes of one sign where there is a mean."""
    mine, linears = [], []
    for seed, shape in enumerate(shapes):
        layer = random_layer("w8a32", *shape, seed=seed)
        layer.int8_weights = layer.int8_weights.abs() if mean else layer.int8_weights
        for rows in batches:
            x = mean + normal(rows, shape[1], seed=rows) * (0.01 if mean else 1)
            expected = exact(layer, x)
            mine.append(relative_error(layer(x), expected))
            linears.append(relative_error(nn.functional.linear(x, layer.dequantize(), layer.bias), expected))
    return torch.tensor(mine).median(), torch.tensor(linears).median()


def with_products(
    monkeypatch,
    has_plain=False,
    has_onednn=False,
    has_fbgemm=False,
    has_float16=False,
    has_split=False,
    has_amx=False,
):
    """Play a machine that has these products and no others."""
    for module in (int8, integer):
        monkeypatch.setattr(module, "has_plain_product", lambda: has_plain)
    monkeypatch.setattr(int8, "has_onednn_product", lambda: has_onednn)
    monkeypatch.setattr(int8, "has_fbgemm_product", lambda: has_fbgemm)
    monkeypatch.setattr(int8, "has_split_product", lambda: has_split)
    for module in (int8, fixed_point):
        monkeypatch.setattr(module, "has_amx", lambda: has_amx)
    for module in (int8, float16, float32):
        monkeypatch.setattr(module, "has_float16_product", lambda: has_float16)


def by_formula(layer, x):
    """What the formula gives for a layer's codes, whichever kernel the layer takes."""
    kernel = "exact" if layer.kernel == "int8" else "reference"
    return quantized_linear(METHODS[layer.method], kernel, x, layer.int8_weights, layer.scales, layer.bias)


def holds_plain_codes(layer):
    return "int8_weights" in dict(layer.named_buffers())


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
