"""Convolutions with int8 weights: exact sums by every kernel, the same bits for a sample in any batch."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import each_method, normal, relative_error
from torch import nn

from tinyq_lightning.kernels import conv_choice
from tinyq_lightning.kernels.conv_choice import CONV_FORMS, ConvShape, choose_convolution
from tinyq_lightning.kernels.conv_onednn import convolves_any_geometry, has_int8_convolution
from tinyq_lightning.kernels.convolution import Geometry, convolve, quantized_convolution
from tinyq_lightning.kernels.integer import has_plain_product
from tinyq_lightning.kernels.onednn import has_onednn_product
from tinyq_lightning.layers.conv_sizes import conv_shape
from tinyq_lightning.methods import METHODS

int8_only = pytest.mark.skipif(
    not has_int8_convolution(), reason="this torch has no int8 convolution for this processor"
)


@st.composite
def cases(draw):
    """A geometry, codes and an input that it can move over."""
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.sampled_from([1, 2, 4, 5, 17, 24]))
    outputs = groups * draw(st.sampled_from([1, 3, 8, 31, 48, 70]))
    each = [draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (5, 1), (2, 2), (3, 2)])) for _ in range(dims)]
    kernel, dilation = zip(*each, strict=True)
    stride = tuple(draw(st.sampled_from([1, 1, 2, 3])) for _ in kernel)
    padding = tuple(draw(st.integers(0, 3)) for _ in kernel)
    if draw(st.booleans()) and draw(st.booleans()):
        kernel, dilation, padding, groups = (1,) * dims, (1,) * dims, (0,) * dims, 1
    moves = zip(kernel, dilation, padding, strict=True)
    smallest = [max(1, gap * (width - 1) + 1 - 2 * pad) for width, gap, pad in moves]
    sizes = [size + draw(st.sampled_from([0, 1, 2, 6, 15])) for size in smallest]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    codes = torch.randint(-127, 128, (outputs, channels // groups, *kernel), generator=generator).to(torch.int8)
    x = torch.randint(-127, 128, (draw(st.integers(1, 3)), channels, *sizes), generator=generator).float()
    x[:, 0].view(len(x), -1)[:, 0] = 127  # so that a step is 1
    if dims > 1 and draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
    return Geometry(stride, padding, dilation, groups), codes, x


def forms_for(codes, geometry):
    """The kernels of rounded activations that can take such codes on this machine."""
    shape = shape_of(codes, geometry)
    wanted = choose_convolution("int8", METHODS["w8a8"], shape).kernel
    yield "float32x1"
    if wanted in CONV_FORMS:
        yield wanted
    if wanted == "int8" and has_int8_convolution() and (shape.usual or convolves_any_geometry()):
        yield "int8-onednn"


def shape_of(codes, geometry):
    outputs, channels, *kernel = codes.shape
    places = codes[0, 0].numel()
    pointwise = places == 1 and channels > 1 and geometry.groups == 1 and not any(geometry.padding)
    alike = all(len(set(each)) == 1 for each in (kernel, geometry.stride, geometry.padding))
    width, stride = kernel[0], geometry.stride[0]
    usual = alike and len(kernel) < 3 and set(geometry.dilation) == {1} and width % 2 == 1 and stride <= min(2, width)
    sizes = channels * geometry.groups, outputs, channels * places
    return ConvShape(*sizes, pointwise, len(kernel), geometry.groups, usual=usual)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_sums_are_those_of_a_float64_convolution_of_the_codes_bit_by_bit(case):
    geometry, codes, x = case
    ones = torch.ones(codes.shape[0])
    wanted = convolve(x.double(), codes.double(), None, geometry)
    for name in forms_for(codes, geometry):
        got = CONV_FORMS[name](codes, ones, geometry, x).product(METHODS["w8a8"], x, ones, None)
        assert torch.equal(got.double(), wanted), name
        larger = torch.empty(1, x.shape[1], *(size + 7 for size in x.shape[2:]))  # laid out for another input
        alone = CONV_FORMS[name](codes, ones, geometry, larger).product(METHODS["w8a8"], x[:1], ones, None)
        assert torch.equal(alone, got[:1]), name
    for kernel in ("exact", "reference"):
        got = quantized_convolution(METHODS["w8a8"], kernel, x, codes, ones, None, geometry)
        assert torch.equal(got.double(), wanted)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_more_digits_are_as_exact_as_float32(case):
    geometry, codes, x = case
    x, scales = x + 0.3 * normal(*x.shape), torch.rand(codes.shape[0]) + 0.1
    bias = normal(codes.shape[0])
    for method in (METHODS["w8a16"], METHODS["w8a32"]):
        wanted = quantized_convolution(method, "exact", x, codes, scales, bias, geometry)
        for name in forms_for(codes, geometry):
            if name != "float32x1":
                got = CONV_FORMS[name](codes, scales, geometry, x).product(method, x, scales, bias)
                assert (got - wanted).norm() <= 1e-6 * wanted.norm().clamp_min(1), name


def layer(outputs=24, channels=16, width=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (outputs, channels, width, width), generator=generator).to(torch.int8)
    return codes, torch.rand(outputs, generator=generator) + 0.1, torch.randn(outputs, generator=generator)


SAME = Geometry((1, 1), (1, 1), (1, 1))


def product(name, method, x, codes, scales, bias, geometry=SAME):
    return CONV_FORMS[name](codes, scales, geometry, x).product(METHODS[method], x, scales, bias)


@int8_only
@each_method
@pytest.mark.parametrize("last", [False, True])
def test_a_sample_has_the_same_bits_in_any_batch_and_for_any_number_of_threads(method, last, threads):
    codes, scales, bias = layer(channels=48)
    x = normal(7, 48, 60, 61)  # more than is convolved at once
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    whole = product("int8-onednn", method, x, codes, scales, bias)
    assert whole.is_contiguous(memory_format=torch.channels_last) == last
    threads(2)
    assert torch.equal(product("int8-onednn", method, x, codes, scales, bias), whole)
    assert torch.equal(product("int8-onednn", method, x[3:5], codes, scales, bias), whole[3:5])


@int8_only
def test_padding_is_zero_and_not_the_zero_point():
    codes = layer()[0]
    x = torch.full((1, 16, 5, 5), 127.0)
    ones = torch.ones(24)
    got = product("int8-onednn", "w8a8", x, codes, ones, None)
    assert torch.equal(got[0, :, 0, 0].double(), 127 * codes[:, :, 1:, 1:].double().sum((1, 2, 3)))
    assert torch.equal(got[0, :, 2, 4].double(), 127 * codes[:, :, :, :2].double().sum((1, 2, 3)))


STRAY = {  # codes, geometry and input for which oneDNN alone returns wrong numbers
    "a window in the padding": ((8, 3, 1, 1), Geometry((2, 2), (2, 1), (1, 1)), (2, 3, 21, 1)),
    "one window of a stride": ((8, 3, 1, 5), Geometry((1, 3), (0, 1), (1, 1)), (2, 3, 21, 5)),
    "a window on both sides": ((32, 16, 2, 2), Geometry((1, 1), (1, 1), (2, 2)), (1, 16, 7, 1)),
    "the same in groups": ((32, 17, 2, 2), Geometry((1, 1), (1, 1), (2, 2), 2), (9, 34, 4, 1)),
    "padded depth of one": ((8, 1, 3, 5, 5), Geometry((1, 1, 1), (1, 2, 2), (1, 1, 1)), (2, 1, 1, 16, 16)),
    "padded places in groups": ((96, 4, 1, 1), Geometry((1, 1), (1, 0), (1, 1), 3), (2, 12, 5, 4)),
    "padded above, not beside": ((8, 4, 7, 1), Geometry((3, 1), (3, 0), (1, 1), 1), (2, 4, 21, 64)),
    "padded above by a wide kernel": ((16, 24, 5, 3), Geometry((1, 2), (2, 0), (1, 2), 1), (2, 24, 4, 132)),
    "strides beyond a dilated kernel": ((15, 64, 2, 3), Geometry((3, 1), (1, 3), (2, 2), 1), (2, 64, 41, 41)),
    "three dimensions, a stride of one": (
        (64, 64, 1, 1, 3),
        Geometry((3, 1, 1), (0, 0, 0), (1, 1, 1), 1),
        (1, 64, 10, 10, 16),
    ),
}


@int8_only
@pytest.mark.parametrize("case", STRAY)
def test_where_onednn_goes_astray_the_input_is_padded_before_or_another_kernel_taken(case):
    shape, geometry, sizes = STRAY[case]
    codes = torch.randint(-127, 128, shape).to(torch.int8)
    x, scales = normal(*sizes), torch.ones(len(codes))
    wanted = quantized_convolution(METHODS["w8a8"], "exact", x, codes, scales, None, geometry)
    name = choose_convolution("int8", METHODS["w8a8"], shape_of(codes, geometry)).kernel
    if convolves_any_geometry():
        assert name == ("int8-onednn" if geometry.groups == 1 else "int8-grouped")
    name = name if name in CONV_FORMS else "float32x1"
    assert torch.equal(product(name, "w8a8", x, codes, scales, None, geometry), wanted)


@int8_only
@pytest.mark.parametrize("any_geometry", [True, False])
def test_groups_and_unusual_moves_are_convolved_in_int8_where_that_is_exact(any_geometry, monkeypatch):
    monkeypatch.setattr(conv_choice, "convolves_any_geometry", lambda: any_geometry)
    several = ConvShape(4 * 64, 4 * 64, 64 * 9, False, groups=4)
    depthwise, unusual = ConvShape(64, 64, 49, False, groups=64), ConvShape(64, 64, 64 * 9, False, usual=False)
    kernels = [choose_convolution("auto", METHODS["w8a8"], shape).kernel for shape in (several, depthwise, unusual)]
    if any_geometry:
        assert kernels == ["int8-grouped", "int8-grouped", "int8-onednn"]
    else:
        assert kernels == ["int8-apart", "int8-grouped", "float32x1"]


def test_a_convolution_is_usual_if_it_moves_alike_in_two_dimensions_at_most():
    usual = [nn.Conv2d(3, 8, 3, 2, 1), nn.Conv1d(3, 8, 5, padding="same"), nn.Conv2d(3, 8, 1)]
    unusual = [
        nn.Conv2d(3, 8, (3, 1)),
        nn.Conv2d(3, 8, 3, padding=(1, 0)),
        nn.Conv2d(3, 8, 3, dilation=2),
        nn.Conv2d(3, 8, 4, 4),
        nn.Conv2d(3, 8, 3, 3),
        nn.Conv3d(3, 8, 3),
    ]
    assert [conv_shape(layer).usual for layer in usual] == [True] * 3
    assert [conv_shape(layer).usual for layer in unusual] == [False] * 6


@int8_only
def test_scales_of_any_strides_are_right():
    codes, x = torch.randint(-127, 128, (64, 64, 3, 3)).to(torch.int8), normal(2, 64, 9, 9)
    scales = torch.rand(64, 2)[:, 0]
    wanted = product("int8-onednn", "w8a8", x, codes, scales.clone(), None)
    assert torch.equal(product("int8-onednn", "w8a8", x, codes, scales, None), wanted)


@int8_only
def test_groups_whose_int8_convolution_is_wrong_are_refused_with_the_reason():
    for channels, outputs, groups in ((2, 96, 2), (16, 528, 16)):
        shape = ConvShape(channels, outputs, channels // groups * 49, False, groups=groups)
        choice = choose_convolution("int8", METHODS["w8a8"], shape)
        assert choice.kernel == "exact"
        assert f"groups of {channels // groups} to {outputs // groups} channels" in choice.reason
        assert choose_convolution("auto", METHODS["w8a8"], shape).kernel == "float32x1"
    assert choose_convolution("int8", METHODS["w8a8"], ConvShape(64, 64, 9, False, groups=64)).kernel == "int8-grouped"


@int8_only
@pytest.mark.parametrize(
    ("shape", "groups", "sizes"),
    [
        ((140, 34, 5, 3), 2, (3, 68, 9, 7)),
        ((140, 34, 3, 3), 2, (3, 68, 9, 7)),
        ((240, 80, 3), 3, (2, 240, 11)),
        ((160, 21, 3, 3, 3), 2, (1, 42, 3, 5, 4)),
    ],
)
@pytest.mark.parametrize("method", ["w8a8", "w8a16"])
def test_such_groups_are_convolved_one_after_the_other_if_they_are_large(shape, groups, sizes, method):
    codes, x = torch.randint(-127, 128, shape).to(torch.int8), normal(*sizes)
    scales, ones = torch.rand(len(codes)) + 0.1, (1,) * (len(shape) - 2)
    geometry = Geometry(ones, ones, ones, groups)
    if not (shape_of(codes, geometry).usual or convolves_any_geometry()):
        pytest.skip("int8 convolutions that move so are wrong on this processor")
    choice = choose_convolution("auto", METHODS[method], shape_of(codes, geometry))
    assert (choice.kernel, choice.bytes_a_weight) == ("int8-apart", 1)
    form = CONV_FORMS["int8-apart"](codes, scales, geometry, x)
    assert torch.equal(form.codes(), codes)
    got = form.product(METHODS[method], x, scales, None)
    wanted = quantized_convolution(METHODS[method], "exact", x, codes, scales, None, geometry)
    assert torch.equal(got, wanted) if method == "w8a8" else relative_error(got, wanted.double()) < 1e-6
    assert torch.equal(got[-1:], form.product(METHODS[method], x[-1:], scales, None))


@each_method
@pytest.mark.parametrize("name", [pytest.param("int8-onednn", marks=int8_only), "float32x1"])
def test_a_sample_that_is_not_finite_gives_no_finite_value_and_leaves_the_others_alone(method, name):
    codes, scales, bias = layer()
    x = normal(3, 16, 9, 9)
    wanted = product(name, method, x, codes, scales, bias)
    for value in (torch.nan, torch.inf):
        bad = x.clone()
        bad[1, 2, 3, 3] = value
        got = product(name, method, bad, codes, scales, bias)
        assert not got[1].isfinite().any()
        assert torch.equal(got[::2], wanted[::2])


@each_method
@pytest.mark.parametrize("name", [pytest.param("int8-onednn", marks=int8_only), "float32x1"])
def test_a_sample_of_zeros_gives_the_bias(method, name):
    codes, scales, bias = layer()
    got = product(name, method, torch.zeros(2, 16, 5, 5), codes, scales, bias)
    assert torch.equal(got, bias.view(1, -1, 1, 1).expand_as(got))


def test_long_sums_are_exact_in_the_formula_too():
    codes = torch.full((2, 700, 3), 127, dtype=torch.int8)
    codes[1] = torch.randint(-127, 128, (700, 3))
    x = torch.full((2, 700, 5), 127.0)
    x[1] = torch.randint(-127, 128, (700, 5))
    x[1, 0, 0] = 127
    geometry, ones = Geometry((1,), (1,), (1,)), torch.ones(2)
    got = quantized_convolution(METHODS["w8a8"], "reference", x, codes, ones, None, geometry)
    assert torch.equal(got, convolve(x.double(), codes.double(), None, geometry).float())


@int8_only
def test_codes_come_back_from_their_packed_form():
    for channels in (1, 3, 16, 67):
        codes, scales, _ = layer(outputs=19, channels=channels)
        form = CONV_FORMS["int8-onednn"](codes, scales, SAME, torch.empty(1, channels, 8, 8))
        assert torch.equal(form._unpacked(), codes)


@pytest.mark.skipif(not has_onednn_product(), reason="no packed int8 product on this processor")
def test_windows_are_rows_of_a_linear_layer():
    codes, scales, bias = layer(outputs=40, channels=30)
    for geometry in (SAME, Geometry((2, 1), (0, 1), (1, 2))):
        x = normal(3, 30, 7, 8)
        got = product("windows", "w8a32", x, codes, scales, bias, geometry)
        weight = codes.double() * scales.view(-1, 1, 1, 1)
        assert relative_error(got, convolve(x.double(), weight, bias.double(), geometry)) < 5e-7


SMALL, LARGE = ConvShape(64, 64, 576, False), ConvShape(512, 512, 4608, False)


def test_the_choice_among_kernels_says_why():
    for kernel in ("auto", "compact", "int8", "reference"):
        for shape in (SMALL, LARGE, ConvShape(64, 64, 9, False, groups=64), ConvShape(64, 64, 64, True)):
            for method in METHODS.values():
                choice = choose_convolution(kernel, method, shape)
                assert choice.reason
                assert choice.kernel in CONV_FORMS or choice.kernel in ("reference", "exact")
                compact = kernel == "compact" and choice.kernel in CONV_FORMS
                assert not compact or CONV_FORMS[choice.kernel].bytes_a_weight < 4
    assert choose_convolution("auto", METHODS["w8a32"], SMALL).kernel == "float32"
    assert choose_convolution("auto", METHODS["w8a8"], SMALL, "cuda").kernel == "reference"
    transposed = ConvShape(64, 64, 576, False, transposed=True)
    assert choose_convolution("int8", METHODS["w8a32"], transposed).kernel == "exact"


@int8_only
def test_large_w8a32_convolutions_take_digits_where_the_processor_multiplies_tiles(monkeypatch):
    choices = {}
    for tiles in (True, False):
        monkeypatch.setattr(conv_choice, "has_amx", lambda tiles=tiles: tiles)
        choices[tiles] = choose_convolution("auto", METHODS["w8a32"], LARGE).kernel
        pointwise = ConvShape(2048, 1024, 2048, True)
        assert choose_convolution("auto", METHODS["w8a32"], pointwise).kernel == "reference"
    assert choices == {True: "int8-onednn", False: "reference"}
    monkeypatch.setattr(conv_choice, "has_amx", lambda: True)
    monkeypatch.setattr(conv_choice, "convolves_any_geometry", lambda: False)
    unusual = replace(LARGE, usual=False)
    assert choose_convolution("auto", METHODS["w8a32"], unusual).kernel == "reference"


@pytest.mark.skipif(not has_plain_product(), reason="no exact product of plain codes on this processor")
def test_pointwise_convolutions_need_no_int8_convolution(monkeypatch):
    monkeypatch.setattr(conv_choice, "convolves_any_geometry", lambda: False)
    strides = ConvShape(64, 128, 64, True, usual=False)
    assert choose_convolution("auto", METHODS["w8a8"], strides).kernel == "int8"


@int8_only
def test_int8_is_taken_where_the_processor_has_it_and_hidden_by_the_environment(tmp_path):
    assert choose_convolution("auto", METHODS["w8a8"], SMALL).kernel == "int8-onednn"
    assert choose_convolution("auto", METHODS["w8a8"], ConvShape(64, 64, 64, True)).kernel == "int8"
    code = """
from tinyq_lightning.kernels import ConvShape, choose_convolution
from tinyq_lightning.methods import METHODS
for kernel in ("auto", "int8"):
    print(choose_convolution(kernel, METHODS["w8a8"], ConvShape(64, 64, 576, False)).kernel)
"""
    environment = {**os.environ, "TINYQ_WITHOUT": "int8", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["float32x1", "exact"]
