"""Quantized convolutions beside torch's own."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
from kernel_cases import each_method, normal, relative_error
from torch import nn

from tinyq_lightning import quantize
from tinyq_lightning.errors import ModelError, ReadOnlyWeightError, SpecError
from tinyq_lightning.kernels.weights import quantize_per_row
from tinyq_lightning.layers.conv import QuantizedConv
from tinyq_lightning.layers.convolutions import CONVOLUTIONS, QuantizedConv2d

CASES = {  # a layer, and the sizes of its input
    "1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), (6, 20)),
    "1d-causal": (lambda: nn.Conv1d(16, 16, 3, dilation=4, padding=8), (16, 30)),
    "1d-same-even": (lambda: nn.Conv1d(6, 8, 4, padding="same"), (6, 20)),
    "2d": (lambda: nn.Conv2d(6, 8, 3, 2, 1), (6, 9, 11)),
    "2d-one-place": (lambda: nn.Conv2d(16, 8, 1, bias=False), (16, 9, 11)),
    "2d-one-place-strided": (lambda: nn.Conv2d(16, 8, 1, 2), (16, 9, 11)),
    "2d-depthwise": (lambda: nn.Conv2d(8, 8, 5, padding=2, groups=8), (8, 9, 11)),
    "2d-groups": (lambda: nn.Conv2d(12, 9, (3, 2), dilation=(2, 1), groups=3), (12, 9, 11)),
    "2d-reflect": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (6, 9, 11)),
    "2d-replicate": (lambda: nn.Conv2d(6, 8, 3, padding=(2, 1), padding_mode="replicate"), (6, 9, 11)),
    "2d-circular-same": (lambda: nn.Conv2d(6, 8, 4, padding="same", padding_mode="circular"), (6, 9, 11)),
    "2d-valid": (lambda: nn.Conv2d(6, 8, 3, padding="valid"), (6, 9, 11)),
    "3d": (lambda: nn.Conv3d(4, 8, (1, 3, 3), (1, 2, 2), (0, 1, 1)), (4, 5, 6, 7)),
    "transposed-1d": (lambda: nn.ConvTranspose1d(8, 6, 4, 2, 1), (8, 20)),
    "transposed-2d-groups": (lambda: nn.ConvTranspose2d(8, 6, 3, 2, 1, 1, groups=2), (8, 5, 6)),
    "transposed-3d": (lambda: nn.ConvTranspose3d(8, 6, 3, 2, bias=False), (8, 3, 4, 5)),
}
LIMITS = {"w8a32": 1e-6, "w8a16": 2e-4, "w8a8": 3e-2}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def quantized_of(conv, method="w8a32", **spec):
    model = nn.Sequential(copy.deepcopy(conv))
    quantize(model, {"method": method, **spec})
    assert isinstance(model[0], QuantizedConv)
    return model[0]


def with_its_weight(conv, layer):
    """The float layer with the dequantized weight."""
    conv = copy.deepcopy(conv)
    with torch.no_grad():
        conv.weight.copy_(layer.weight)
    return conv


# torch's own layer warns that it pads at one end
@each_method
@each_case
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kernel", ["auto", "compact", "int8", "reference"])
def test_output_and_gradient_are_those_of_torch_with_the_dequantized_weight(case, method, kernel):
    make, sizes = CASES[case]
    conv = make()
    layer = quantized_of(conv, method, kernel=kernel)
    beside = with_its_weight(conv, layer)
    limit = LIMITS[layer.method]
    for batch in ((3,), (1,), ()):
        x = normal(*batch, *sizes)
        with torch.no_grad():
            wanted, got = beside(x), layer(x)
        assert got.shape == wanted.shape
        assert got.is_contiguous() == wanted.is_contiguous()
        assert relative_error(got, wanted.double()) < limit
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        out = layer(mine)
        assert torch.equal(out, got), "with gradients or without, a layer has the same bits"
        up = normal(*out.shape, seed=5)
        out.backward(up)
        beside(theirs).backward(up)
        assert relative_error(mine.grad, theirs.grad.double()) < 1e-6
        if conv.bias is not None:
            assert relative_error(layer.bias.grad, beside.bias.grad.double()) < 1e-5
            layer.bias.grad = beside.bias.grad = None
    assert layer(normal(0, *sizes)).shape == (0, *beside(normal(1, *sizes)).shape[1:])


@each_method
@each_dtype
@pytest.mark.parametrize("case", ["1d", "2d", "2d-depthwise", "2d-one-place", "transposed-2d-groups"])
def test_any_dtype_and_autocast(case, method, dtype):
    make, sizes = CASES[case]
    conv, x = make().to(dtype), normal(2, *sizes).to(dtype)
    layer = quantized_of(conv, method)
    limit = max(LIMITS[layer.method], 8 * torch.finfo(dtype).eps)
    with torch.no_grad():
        wanted, got = with_its_weight(conv, layer)(x), layer(x)
        assert got.dtype == wanted.dtype
        assert relative_error(got, wanted.double()) < limit
        with torch.autocast("cpu", torch.bfloat16):
            expected = conv(x)
            assert layer(x).dtype == expected.dtype
            assert relative_error(layer(x), expected.double()) < 0.06


@each_case
def test_the_state_dict_has_codes_in_the_shape_of_the_weight_and_a_scale_for_each_output_channel(case):
    conv = CASES[case][0]()
    layer = quantized_of(conv)
    state = layer.state_dict()
    assert set(state) == {"int8_weights", "scales", *(["bias"] if conv.bias is not None else [])}
    assert (state["int8_weights"].shape, state["int8_weights"].dtype) == (conv.weight.shape, torch.int8)
    assert (state["scales"].shape, state["scales"].dtype) == ((conv.out_channels,), torch.float32)
    if not conv.transposed:
        codes, scales = quantize_per_row(conv.weight.flatten(1))
        assert torch.equal(state["int8_weights"].flatten(1), codes)
        assert torch.equal(state["scales"], scales)
    assert (layer.weight - conv.weight).abs().max() <= layer.scales.max() / 2 * 1.001
    assert layer.weight.shape == conv.weight.shape
    assert layer.bias is None or torch.equal(layer.bias, conv.bias)
    assert layer.quantize(conv.weight) is layer
    assert torch.equal(layer.int8_weights, state["int8_weights"])


@each_case
def test_it_is_the_layer_of_torch_that_it_stands_for(case):
    conv = CASES[case][0]()
    layer = quantized_of(conv)
    assert isinstance(layer, type(conv))
    assert type(layer) is CONVOLUTIONS[type(conv)]
    for name in ("in_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(layer, name) == getattr(conv, name)
    assert repr(conv).partition("(")[2][:-1] in repr(layer)


@each_method
def test_copies_pickles_and_files_have_the_same_bits(method):
    conv, x = CASES["2d"][0](), normal(2, 6, 9, 11)
    layer = quantized_of(conv, method)
    wanted = layer(x)
    other = copy.deepcopy(layer)
    assert torch.equal(other(x), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), wanted)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = quantized_of(nn.Conv2d(6, 8, 3, 2, 1), method)
    fresh(x)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(x), wanted)
    other.int8_weights.zero_()
    assert torch.equal(other(x), other.bias.view(1, -1, 1, 1).expand_as(wanted))
    assert torch.equal(layer(x), wanted)


@each_method
def test_another_method_shares_the_codes(method):
    layer = quantized_of(nn.Conv2d(6, 8, 3), "w8a32")
    other = layer.with_method(method)
    assert other.method == method
    assert other.int8_weights is layer.int8_weights
    assert torch.equal(other(normal(2, 6, 5, 5)), quantized_of_same(layer, method)(normal(2, 6, 5, 5)))
    with pytest.raises(NotImplementedError, match="no method w8a8"):
        quantized_of(nn.ConvTranspose2d(6, 8, 3)).with_method("w8a8")


def quantized_of_same(layer, method):
    conv = nn.Conv2d(6, 8, 3)
    other = quantized_of(conv, method)
    other.load_state_dict(layer.state_dict())
    return other


def test_weight_and_bias_are_guarded_as_those_of_linear_layers():
    layer = quantized_of(nn.Conv2d(6, 8, 3))
    with pytest.raises(ReadOnlyWeightError, match=r"quantize\(weight\)"):
        layer.weight = torch.zeros(8, 6, 3, 3)
    with pytest.raises(ReadOnlyWeightError):
        layer.weight.data.zero_()
    with pytest.raises(ModelError, match=re.escape("[8], got [7]")):
        layer.bias = torch.zeros(7)
    with pytest.raises(ModelError, match=re.escape("[8, 6, 3, 3], got [8, 6, 3]")):
        layer.quantize(torch.zeros(8, 6, 3))
    with pytest.raises(SpecError, match="kernel"):
        layer.kernel = "fast"
    layer.bias = torch.ones(8)
    assert isinstance(layer.bias, nn.Parameter)


@each_method
@pytest.mark.parametrize("shape", [(2, 5, 9, 9), (9, 9), (2, 2, 6, 9, 9), (5, 9, 9)])
def test_an_input_of_another_shape_is_refused_in_words(method, shape):
    layer = quantized_of(nn.Conv2d(6, 8, 3), method)
    with pytest.raises(ValueError, match=re.escape(f"[N, 6, H, W] or [6, H, W], got {list(shape)}")):
        layer(torch.zeros(shape))
    with pytest.raises(TypeError, match="floating dtype"):
        layer(torch.zeros(2, 6, 9, 9, dtype=torch.int64))


@each_method
@pytest.mark.parametrize("case", ["2d", "2d-one-place", "2d-depthwise", "3d", "transposed-2d-groups"])
def test_channels_stay_last(case, method):
    make, sizes = CASES[case]
    conv, x = make(), normal(2, *sizes)
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    layer = quantized_of(conv, method)
    wanted = layer(x)
    with torch.no_grad():
        got = layer(x.contiguous(memory_format=last))
        assert got.is_contiguous(memory_format=last)
        assert relative_error(got, wanted.double()) < 1e-6
        for moved in (quantized_of(copy.deepcopy(conv).to(memory_format=last), method), layer.to(memory_format=last)):
            assert moved(x).is_contiguous(memory_format=last), "as of a float layer whose weight has channels last"
        assert layer.to(memory_format=torch.contiguous_format)(x).is_contiguous()


@pytest.mark.parametrize("kernel", ["auto", "int8", "compact", "reference"])
@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (lambda: nn.ConvTranspose1d(4, 6, 2, padding=1), (2, 4, 1)),
        (lambda: nn.ConvTranspose2d(4, 6, 2, padding=1), (2, 4, 1, 3)),
        (lambda: nn.Conv2d(4, 6, 3), (0, 4, 5, 5)),
    ],
)
def test_an_empty_output_is_that_of_the_float_layer(make, sizes, kernel):
    conv, x = make(), normal(*sizes)
    model = nn.Sequential(conv)
    quantize(model, {"method": "w8a32", "kernel": kernel})
    assert model(x).shape == conv(x).shape


def images():
    """Inputs ``[N, 6, H, W]`` in every order that torch tells apart."""
    last = normal(2, 6, 9, 11).contiguous(memory_format=torch.channels_last)
    return {
        "contiguous": normal(1, 6, 9, 11),
        "last": last,
        "one image": normal(9, 11, 6).permute(2, 0, 1).unsqueeze(0),
        "one image with channels last": last[:1],
        "a part of the places": last[:, :, 1:8, 2:9],
        "a part of the channels": normal(2, 12, 9, 11)[:, ::2],
        "one place": normal(2, 6, 1, 1),
        "one place with channels last": normal(2, 1, 1, 6).permute(0, 3, 1, 2),
    }


@pytest.mark.parametrize("kernel", ["auto", "compact"])
def test_four_bits_take_channels_last_after_quantizing(kernel):
    x, model = normal(2, 6, 9, 9), nn.Sequential(nn.Conv2d(6, 8, 3))
    quantize(model, {"method": "w4a32", "kernel": kernel})
    want = model(x)
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(x), want)


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 8, 3), lambda: nn.Conv3d(3, 8, 2), lambda: nn.Conv2d(4, 8, 1)])
def test_the_weight_lies_in_memory_as_the_float_weight(make):
    for layout in (
        torch.contiguous_format,
        torch.channels_last if make().weight.dim() == 4 else torch.channels_last_3d,
    ):
        conv = make().to(memory_format=layout)
        model = nn.Sequential(conv)
        quantize(model, "w8a32")
        for read in (model[0].weight, model[0].weight.clone(), model[0].weight):
            assert read.is_contiguous(memory_format=layout)
        assert torch.equal(model[0].weight, model[0].dequantize())
        model.to(memory_format=torch.contiguous_format)
        assert model[0].weight.is_contiguous()


@each_method
@pytest.mark.parametrize("width", [1, 3])
def test_outputs_lie_in_memory_as_those_of_the_float_layer_whatever_the_first_input(method, width):
    conv = nn.Conv2d(6, 8, width, padding=width // 2)
    with torch.no_grad():
        for kernel in ("auto", "compact", "int8", "reference"):
            for first in ("contiguous", "last"):
                layer = quantized_of(conv, method, kernel=kernel)
                layer(images()[first])
                for name, x in images().items():
                    got, wanted = layer(x), conv(x)
                    both = got.is_contiguous() and wanted.is_contiguous()  # as by the formula where there is one place
                    assert both or got.stride() == wanted.stride(), (kernel, first, name)


@each_method
def test_an_image_of_a_default_device_other_than_its_own(method):
    layer, x = quantized_of(nn.Conv2d(6, 8, 3), method), normal(2, 6, 9, 9)
    wanted = layer(x)
    with torch.device("meta"):
        got = layer(x)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_no_float_copy(dtype):
    layer = quantized_of(nn.Conv2d(6, 8, 3).to(dtype))
    assert layer.choice.kernel == "float32"
    layer(normal(2, 6, 9, 9).to(dtype))
    assert not list(layer._forms.values())


def test_output_size_of_a_transposed_convolution():
    conv = nn.ConvTranspose2d(6, 4, 3, 2, 1)
    layer, x = quantized_of(conv), normal(2, 6, 5, 5)
    beside = with_its_weight(conv, layer)
    assert layer(x, output_size=[10, 9]).shape == (2, 4, 10, 9)
    assert torch.equal(layer(x, output_size=[10, 9]), beside(x, output_size=[10, 9]))
    assert torch.equal(layer(x[0], output_size=[10, 9]), beside(x[0], output_size=[10, 9]))
    with pytest.raises(ValueError, match="output size"):
        layer(x, output_size=[20, 9])


def test_moves_that_are_changed_later_are_those_that_count():
    layer, x = quantized_of(nn.Conv2d(6, 8, 3, padding=1), "w8a8"), normal(2, 6, 9, 9)
    before = layer(x)
    layer.stride = (2, 2)
    assert torch.equal(layer(x), before[:, :, ::2, ::2])


@each_method
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_same_padding_is_that_of_torch_after_another_dilation(mode, method):
    conv = nn.Conv2d(6, 8, 3, padding="same", padding_mode=mode)
    layer, x = quantized_of(conv, method), normal(2, 6, 9, 9)
    layer(x)
    for each in (layer, conv):
        each.dilation = (2, 2)
    beside = with_its_weight(conv, layer)
    assert layer(x).shape == beside(x).shape
    assert relative_error(layer(x).detach(), beside(x).detach().double()) < LIMITS[method]


@each_method
def test_casts_keep_codes_and_scales(method):
    layer = quantized_of(nn.Conv2d(6, 8, 3), method)
    codes, scales = layer.int8_weights.clone(), layer.scales.clone()
    layer(normal(1, 6, 9, 9))
    for cast in (nn.Module.half, nn.Module.double, nn.Module.bfloat16):
        cast(layer)
        assert layer.dtype == layer.weight.dtype == layer.bias.dtype
        assert torch.equal(layer.int8_weights, codes)
        assert torch.equal(layer.scales, scales)
        assert layer(normal(1, 6, 9, 9).to(layer.dtype)).dtype == layer.dtype


def test_a_large_layer_holds_one_byte_a_weight():
    for method, batch in (("w8a8", 1), ("w8a32", 1), ("w8a32", 30)):
        layer = quantized_of(nn.Conv2d(400, 300, 3, padding=1), method)
        layer(normal(batch, 400, 5, 5))
        forms = list(layer._forms.values())
        held = sum(form.bytes_a_weight for form in forms)
        assert held + (layer._buffers["int8_weights"] is not None) == 1
        assert layer.state_dict()["int8_weights"].shape == (300, 400, 3, 3)
    layer = quantized_of(nn.Conv2d(400, 300, 3, padding=1), "w8a32")
    few, many = normal(1, 400, 5, 5), normal(30, 400, 5, 5)
    first = layer(few), layer(many), layer(few), layer(many)
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[1], first[3])
    forms = [form for form in layer._forms.values() if form.holds_codes]
    assert len(forms) + (layer._buffers["int8_weights"] is not None) == 1, "few windows and many in turn"


def test_layers_with_the_same_codes_share_the_form_made_of_them():
    first, second = (quantized_of(nn.Conv2d(40, 30, 3, bias=False), "w8a8") for _ in range(2))
    second.share(first)
    x = normal(1, 40, 6, 6)
    assert torch.equal(first(x), second(x))
    assert first.state_dict()["int8_weights"] is second.state_dict()["int8_weights"]


# torch's own forward mode scripts some of its functions
@each_method
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", ["2d", "2d-one-place", "2d-depthwise", "1d-causal", "transposed-1d"])
def test_transforms_are_those_of_the_dequantized_layer(case, method):
    make, sizes = CASES[case]
    conv, x = make(), normal(2, *sizes)
    layer = quantized_of(conv, method)
    beside = with_its_weight(conv, layer)
    assert relative_error(torch.vmap(layer)(x), layer(x).double()) < 1e-6
    up = normal(*layer(x).shape, seed=4)
    mine, theirs = (torch.func.vjp(each, x)[1](up)[0] for each in (layer, beside))
    assert relative_error(mine, theirs.double()) < 1e-6
    tangent = normal(*x.shape, seed=6)
    mine, theirs = (torch.func.jvp(each, (x,), (tangent,))[1] for each in (layer, beside))
    assert relative_error(mine, theirs.double()) < 1e-6
    gradient = [
        torch.autograd.grad(each(y := x.clone().requires_grad_()).tanh().sum(), y, create_graph=True)[0]
        for each in (layer, beside)
    ]
    assert relative_error(gradient[0].detach(), gradient[1].detach().double()) < LIMITS["w8a8"] * 4


def test_quantized_convolutions_are_classes_of_their_own():
    assert issubclass(QuantizedConv2d, nn.Conv2d)
    assert len(CONVOLUTIONS) == 6
