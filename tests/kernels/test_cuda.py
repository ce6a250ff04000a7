"""What a GPU computes by, as far as a CPU can compute it too: the same operators, with real values."""

import pytest
import torch
from kernel_cases import normal, random_layer

from tinyq_lightning.kernels import ConvShape, choose_convolution, choose_kernel, conv_choice, int8, integer
from tinyq_lightning.kernels.base import LONGEST_SUM
from tinyq_lightning.kernels.conv_choice import convolve_once
from tinyq_lightning.kernels.convolution import Geometry, quantized_convolution
from tinyq_lightning.kernels.formula import quantized_linear
from tinyq_lightning.kernels.integer import padded_int_mm
from tinyq_lightning.kernels.weights import divisor
from tinyq_lightning.methods import METHODS


def exact_product(digits, codes):
    """``torch._int_mm`` as a GPU has it: on a CPU without VNNI it saturates."""
    return (digits.double() @ codes.double()).to(torch.int32)


GEOMETRIES = {
    "1d": ((3,), Geometry((1,), (1,), (1,)), (11,)),
    "2d": ((3, 3), Geometry((2, 1), (1, 0), (1, 1)), (9, 10)),
    "dilated": ((3, 2), Geometry((1, 2), (2, 1), (2, 3)), (9, 10)),
    "3d": ((2, 1, 2), Geometry((1, 1, 1), (0, 1, 0), (1, 1, 1)), (4, 5, 6)),
}


def integers(*shape, seed=0):
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", exact_product)


@pytest.fixture
def gpu(monkeypatch):
    """A machine whose GPU has an exact product."""
    for module in (int8, integer):
        monkeypatch.setattr(module, "has_cuda_product", lambda: True)


def cublas(digits, codes):
    """The product that cuBLAS would give, and the sizes that it refuses."""
    assert digits.shape[0] > 16
    assert all(size and not size % 8 for size in (digits.shape[1], codes.shape[1]))
    return (digits.double() @ codes.double()).int()


@pytest.mark.parametrize("sizes", [(1, 1, 1), (0, 8, 8), (16, 20, 30), (17, 24, 8), (40, 7, 64), (3, 16, 0)])
def test_zeros_around_digits_and_codes_change_no_sum(sizes, monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", cublas)
    rows, features, outputs = sizes
    digits, codes = integers(rows, features), integers(outputs, features, seed=1)
    assert torch.equal(padded_int_mm(digits, codes).double(), digits.double() @ codes.double().T)


def test_methods_that_round_take_the_integers_of_a_gpu(gpu):
    for method in METHODS.values():
        for kernel in ("auto", "int8", "reference"):
            choice = choose_kernel(kernel, method, 64, 64, "cuda").kernel
            integers = kernel == "int8" or (kernel == "auto" and method.rounds)
            assert choice == ("int8-cuda" if integers else "reference")
    refused = choose_kernel("int8", METHODS["w8a8"], 1, LONGEST_SUM + 1, "cuda")
    assert (refused.kernel, "overflow" in refused.reason) == ("exact", True)


def test_a_gpu_without_an_exact_product_takes_float64():
    assert choose_kernel("auto", METHODS["w8a8"], 64, 64, "cuda").kernel == "reference"  # which is of float64 there
    assert choose_kernel("int8", METHODS["w8a8"], 64, 64, "cuda").kernel == "exact"


def test_convolutions_of_one_group_take_the_integers_of_a_gpu(gpu):
    one, several = ConvShape(8, 8, 72, False), ConvShape(8, 8, 18, False, groups=4)
    assert choose_convolution("auto", METHODS["w8a16"], one, "cuda").kernel == "int8-cuda"
    assert choose_convolution("auto", METHODS["w8a32"], one, "cuda").kernel == "reference"
    assert choose_convolution("int8", METHODS["w8a32"], one, "cuda").kernel == "int8-cuda"
    assert choose_convolution("auto", METHODS["w8a16"], several, "cuda").kernel == "reference"
    assert choose_convolution("int8", METHODS["w8a16"], several, "cuda").kernel == "exact"


@pytest.mark.parametrize("method", ["w8a32", "w8a16", "w8a8"])
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_linear_sums_of_integers_are_those_of_float64(method, rows, monkeypatch):
    monkeypatch.setattr(integer, "int_mm", padded_int_mm)
    layer, x = random_layer(method, 30, 21), normal(rows, 21)
    arguments = x, layer.int8_weights, layer.scales, layer.bias
    mine, exact = (quantized_linear(METHODS[method], kernel, *arguments) for kernel in ("integer", "exact"))
    if method == "w8a8":
        assert torch.equal(mine, exact)
    torch.testing.assert_close(mine, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["w8a32", "w8a16", "w8a8"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_convolutions_of_windows_are_those_of_float64(name, method, monkeypatch):
    monkeypatch.setattr("tinyq_lightning.kernels.convolution.int_mm", padded_int_mm)
    kernel, geometry, sizes = GEOMETRIES[name]
    codes, scales, bias = integers(5, 3, *kernel), normal(5).abs(), normal(5, seed=2)
    for at_once in (2**28, 1):
        monkeypatch.setattr("tinyq_lightning.kernels.convolution._WINDOW_BYTES", at_once)
        arguments = normal(4, 3, *sizes), codes, scales, bias, geometry
        mine, exact = (quantized_convolution(METHODS[method], kernel, *arguments) for kernel in ("integer", "exact"))
        assert mine.is_contiguous() == exact.is_contiguous()
        if method == "w8a8":
            assert torch.equal(mine, exact)
        torch.testing.assert_close(mine, exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kernel", ["integer", "exact"])
def test_integers_of_half_precision_are_whole(kernel):
    width, geometry, sizes = GEOMETRIES["2d"]
    x, scales = normal(2, 3, *sizes).bfloat16(), normal(5).abs()
    codes = integers(5, 3, *width)
    out = quantized_convolution(METHODS["w8a32"], kernel, x, codes, scales, None, geometry)
    expected = quantized_convolution(METHODS["w8a32"], "exact", x.float(), codes, scales, None, geometry)
    torch.testing.assert_close(out, expected.bfloat16(), rtol=1e-2, atol=1e-4)


def test_windows_keep_channels_last():
    kernel, geometry, sizes = GEOMETRIES["2d"]
    x = normal(2, 3, *sizes).contiguous(memory_format=torch.channels_last)
    out = quantized_convolution(METHODS["w8a8"], "integer", x, integers(5, 3, *kernel), normal(5).abs(), None, geometry)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_codes_that_are_used_once_take_the_integers_too(monkeypatch):
    kernel, geometry, sizes = GEOMETRIES["2d"]
    monkeypatch.setattr(conv_choice, "_choose_for_codes", lambda *_: conv_choice.Choice("int8-cuda", ""))
    method, codes, scales = METHODS["w4a8"], integers(5, 3, *kernel), normal(5).abs()
    arguments = normal(2, 3, *sizes), codes, scales, None, geometry
    once = convolve_once(ConvShape(3, 5, 27, False), method, *arguments)
    assert torch.equal(once, quantized_convolution(method, "exact", *arguments))


def test_other_devices_divide_by_a_number_of_their_own():
    assert divisor(torch.ones(2), 127) == 127
    number = divisor(torch.ones(2, device="meta"), 127)
    assert (number.device.type, number.dim(), number.dtype) == ("meta", 0, torch.float32)
