"""Custom quantized layers: every layer passes the one tester below."""

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn

from tinyq_lightning import (
    W4A8LinearLayer,
    W4A16LinearLayer,
    W4A32LinearLayer,
    W8A8LinearLayer,
    W8A16LinearLayer,
    W8A32LinearLayer,
    w8_a8_forward,
    w8_a16_forward,
)
from tinyq_lightning import w8_a32_forward as w8_a32
from tinyq_lightning.errors import ModelError, ReadOnlyWeightError
from tinyq_lightning.kernels.four_bits import quantize_groups_expanded
from tinyq_lightning.kernels.weights import dequantize, quantize_per_row
from tinyq_lightning.layers.linear import LAYERS, QuantizedLinear
from tinyq_lightning.methods import KERNELS, METHODS

FORWARDS = {
    W8A32LinearLayer: w8_a32,
    W8A16LinearLayer: w8_a16_forward,
    W8A8LinearLayer: w8_a8_forward,
    W4A32LinearLayer: w8_a32,
    W4A16LinearLayer: w8_a16_forward,
    W4A8LinearLayer: w8_a8_forward,
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
IN, OUT = 20, 7

CASTS = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "float": (lambda m: m.float(), torch.float32),
    "double": (lambda m: m.double(), torch.float64),
    "to-bfloat16": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to-device-and-half": (lambda m: m.to("cpu", torch.float16), torch.float16),
    "to-like-tensor": (lambda m: m.to(torch.empty(0, dtype=torch.float16)), torch.float16),
    "type": (lambda m: m.type(torch.float16), torch.float16),
    "type-by-name": (lambda m: m.type("torch.DoubleTensor"), torch.float64),
    "there-and-back": (lambda m: m.half().double().bfloat16().float(), torch.float32),
    "inside-a-module": (lambda m: nn.Sequential(m).half()[0], torch.float16),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("kind", FORWARDS, ids=lambda kind: kind.__name__)
class TestEveryLayer:
    """What each quantized layer promises, for every dtype, with and without a bias."""

    @pytest.fixture(autouse=True)
    def _parts(self, kind, dtype, bias):
        self.linear = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
        self.layer = kind.from_linear(self.linear)
        self.x = torch.randn(3, IN).to(dtype)

    def assert_same(self, other, layer=None):
        """``other`` has the bits of ``layer`` in its state and in its output."""
        layer = layer or self.layer
        mine, theirs = layer.state_dict(), other.state_dict()
        assert list(mine) == list(theirs)
        for name, tensor in mine.items():
            assert theirs[name].dtype == tensor.dtype, name
            assert torch.equal(theirs[name], tensor), name
        assert type(other) is type(layer)
        assert (other.dtype, other.kernel, other.training) == (layer.dtype, layer.kernel, layer.training)
        assert torch.equal(other(self.x), layer(self.x))

    def test_state_dict_has_codes_float32_scales_and_the_bias(self, kind, dtype, bias):
        state = self.layer.state_dict()
        if METHODS[kind.method].bits == 8:
            codes = {"int8_weights": ((OUT, IN), torch.int8)}
        else:
            codes = {"int4_weights": ((OUT, IN // 2), torch.uint8), "multipliers": ((OUT, 1), torch.uint8)}
        assert set(state) == {*codes, "scales", *(["bias"] if bias else [])}
        assert {name: (state[name].shape, state[name].dtype) for name in codes} == codes
        assert (state["scales"].shape, state["scales"].dtype) == ((OUT,), torch.float32)
        if bias:
            assert (state["bias"].shape, state["bias"].dtype) == ((OUT,), dtype)

    def test_from_linear_holds_the_codes_of_the_weight_math(self, kind, dtype, bias):
        if METHODS[kind.method].bits == 8:
            codes, scales = quantize_per_row(self.linear.weight)
        else:
            codes, _, scales = quantize_groups_expanded(self.linear.weight)
        assert torch.equal(self.layer.int8_weights, codes)
        assert torch.equal(self.layer.scales, scales)
        assert (self.layer.in_features, self.layer.out_features, self.layer.dtype) == (IN, OUT, dtype)

    def test_from_linear_carries_the_bias_over_without_a_copy(self, kind, dtype, bias):
        assert self.layer.bias is self.linear.bias

    def test_from_linear_keeps_the_mode(self, kind, dtype, bias):
        assert self.layer.training
        assert not kind.from_linear(self.linear.eval()).training
        assert not self.layer.eval().training

    def test_quantize_and_a_settable_bias_make_the_same_layer(self, kind, dtype, bias):
        layer = kind(IN, OUT, bias, dtype)
        assert layer.quantize(self.linear.weight) is layer
        if bias:
            layer.bias = self.linear.bias
        self.assert_same(layer)

    def test_forward_is_the_forward_function_of_the_method(self, kind, dtype, bias):
        self.layer.kernel = "reference"
        out = self.layer(self.x)
        assert out.dtype == dtype
        expected = FORWARDS[kind](self.x, self.layer.int8_weights, self.layer.scales, self.layer.bias)
        assert torch.equal(out, expected)

    def test_forward_is_the_formula_by_every_kernel(self, kind, dtype, bias):
        expected = FORWARDS[kind](self.x, self.layer.int8_weights, self.layer.scales, self.layer.bias)
        tolerance = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-6, torch.float64: 2e-6}[dtype]
        if METHODS[kind.method].digits == 2:  # what it rounds away is kept where that costs nothing
            tolerance = max(tolerance, 1e-4)
        for kernel in KERNELS:
            self.layer.kernel = kernel
            torch.testing.assert_close(self.layer(self.x), expected, rtol=tolerance, atol=tolerance)

    def test_output_is_near_that_of_the_linear(self, kind, dtype, bias):
        expected = self.linear(self.x).double()
        share = 0.03 if METHODS[kind.method].bits == 8 else 0.2
        assert (self.layer(self.x).double() - expected).abs().max() < share * expected.abs().max() + 0.01

    @pytest.mark.parametrize("cast", CASTS)
    def test_scales_stay_float32_and_codes_int8_whatever_the_cast(self, kind, dtype, bias, cast):
        codes, scales = self.layer.int8_weights.clone(), self.layer.scales.clone()
        apply, target = CASTS[cast]
        layer = apply(self.layer)
        assert layer is self.layer
        assert layer.int8_weights.dtype == torch.int8
        assert layer.scales.dtype == torch.float32
        assert torch.equal(layer.int8_weights, codes)
        assert torch.equal(layer.scales, scales)
        assert layer.dtype == layer.weight.dtype == target
        assert layer.bias is None or layer.bias.dtype == target
        assert layer(self.x.to(target)).dtype == target

    def test_weight_is_the_dequantized_one_in_the_layers_dtype(self, kind, dtype, bias):
        assert torch.equal(self.layer.weight, dequantize(self.layer.int8_weights, self.layer.scales, dtype))
        assert (self.layer.weight.shape, self.layer.weight.dtype) == ((OUT, IN), dtype)
        work = torch.float64 if dtype == torch.float64 else torch.float32
        assert self.layer.dequantize().dtype == work
        assert torch.equal(self.layer.dequantize().to(dtype), self.layer.weight)

    def test_weight_is_read_only_and_says_so(self, kind, dtype, bias):
        before = self.layer.weight
        for value in (torch.zeros(OUT, IN), nn.Parameter(torch.zeros(OUT, IN)), None):
            with pytest.raises(ReadOnlyWeightError, match=rf"{kind.__name__} is a read-only .*quantize\(weight\)"):
                self.layer.weight = value
        assert torch.equal(self.layer.weight, before)
        assert "weight" not in dict(self.layer.named_parameters())
        assert "weight" not in self.layer.state_dict()

    def test_bias_can_be_set_with_a_tensor_and_with_a_parameter(self, kind, dtype, bias):
        values, parameter = torch.randn(OUT), nn.Parameter(torch.randn(OUT))
        self.layer.bias = values
        assert isinstance(self.layer.bias, nn.Parameter)
        assert torch.equal(self.layer.bias, values)
        assert "bias" in self.layer.state_dict()
        self.layer.bias = parameter
        assert self.layer.bias is parameter
        self.layer.bias = None
        assert self.layer.bias is None
        assert "bias" not in self.layer.state_dict()

    def test_bias_of_another_shape_is_refused_with_both_shapes(self, kind, dtype, bias):
        before = self.layer.bias
        for shape in ((OUT + 1,), (1, OUT), ()):
            for value in (torch.zeros(shape), nn.Parameter(torch.zeros(shape))):
                with pytest.raises(ModelError, match=re.escape(f"[{OUT}], got {list(shape)}")):
                    self.layer.bias = value
        assert self.layer.bias is before

    def test_weight_of_another_shape_is_refused_with_both_shapes(self, kind, dtype, bias):
        before = self.layer.int8_weights
        for shape in ((IN, OUT), (OUT,), (OUT, IN + 1)):
            with pytest.raises(ModelError, match=re.escape(f"[{OUT}, {IN}], got {list(shape)}")):
                self.layer.quantize(torch.zeros(shape))
        assert self.layer.int8_weights is before

    def test_non_finite_weight_is_refused_and_the_layer_stays(self, kind, dtype, bias):
        weight = self.linear.weight.detach().clone()
        weight[0, 0] = torch.nan
        before = self.layer.weight
        with pytest.raises(ModelError, match=f"1 of {OUT * IN} weights are not finite"):
            self.layer.quantize(weight)
        assert torch.equal(self.layer.weight, before)

    def test_deepcopy_is_bit_equal_and_apart(self, kind, dtype, bias):
        self.layer.kernel = "int8"
        other = copy.deepcopy(self.layer)
        self.assert_same(other)
        other.int8_weights.zero_()
        assert self.layer.int8_weights.any()

    def test_pickle_is_bit_equal(self, kind, dtype, bias):
        self.layer.kernel = "int8"
        self.assert_same(pickle.loads(pickle.dumps(self.layer.eval())))

    def test_state_dict_comes_back_bit_equal_from_a_plain_file(self, kind, dtype, bias):
        file = io.BytesIO()
        torch.save(self.layer.state_dict(), file)
        file.seek(0)
        fresh = kind(IN, OUT, bias, dtype)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        self.assert_same(fresh)

    @pytest.mark.parametrize("assign", [True, False])
    def test_state_dict_loads_into_a_fresh_layer_on_cpu_and_meta(self, kind, dtype, bias, assign):
        device = "meta" if assign else "cpu"
        fresh = kind(IN, OUT, bias, dtype, device)
        fresh.load_state_dict(self.layer.state_dict(), assign=assign)
        self.assert_same(fresh)

    def test_extra_repr_names_sizes_bias_and_dtype(self, kind, dtype, bias):
        shown = repr(self.layer)
        expected = f"{kind.__name__}(in_features={IN}, out_features={OUT}, bias={bias}, dtype={dtype})"
        assert shown == expected
        self.layer.kernel = "int8"
        assert repr(self.layer) == expected[:-1] + ", kernel=int8)"

    def test_gradients_reach_the_input_and_a_bias_that_wants_them(self, kind, dtype, bias):
        x = self.x.clone().requires_grad_()
        self.layer(x).float().sum().backward()
        expected = self.layer.dequantize().double().sum(0).expand(3, IN)
        tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(x.grad.double(), expected, rtol=tolerance, atol=tolerance)
        if bias:
            assert torch.equal(self.linear.bias.grad, torch.full((OUT,), 3, dtype=dtype))

    def test_no_parameter_but_the_bias(self, kind, dtype, bias):
        assert [name for name, each in self.layer.named_parameters() if each.numel()] == (["bias"] if bias else [])
        assert self.layer.int8_weights.requires_grad is self.layer.scales.requires_grad is False

    def test_some_parameter_tells_dtype_and_device(self, kind, dtype, bias):
        for layer in (self.layer, copy.deepcopy(self.layer).double(), copy.deepcopy(self.layer).to("meta")):
            found = next(layer.parameters())
            assert (found.dtype, found.device) == (layer.dtype, layer.scales.device)
        codes = {"int8_weights"} if METHODS[kind.method].bits == 8 else {"int4_weights", "multipliers"}
        assert set(self.layer.state_dict()) == {*codes, "scales", *(["bias"] if bias else [])}
        assert self.layer.load_state_dict(self.layer.state_dict()).missing_keys == []

    def test_to_meta_and_to_empty_keep_the_dtypes(self, kind, dtype, bias):
        layer = self.layer.to("meta")
        assert (layer.int8_weights.device.type, layer.scales.device.type) == ("meta", "meta")
        layer = layer.to_empty(device="cpu").half()
        assert (layer.int8_weights.dtype, layer.scales.dtype, layer.dtype) == (torch.int8, torch.float32, torch.float16)
        assert layer.scales.device.type == "cpu"


def test_every_method_has_its_layer():
    assert {kind.method: kind for kind in FORWARDS} == LAYERS
    assert set(LAYERS) == set(METHODS)
    assert all(issubclass(kind, QuantizedLinear) for kind in LAYERS.values())


def test_autocast_and_layer_give_the_dtype_of_a_linear():
    linear = nn.Linear(IN, OUT)
    for kind in FORWARDS:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert kind.from_linear(linear)(torch.randn(2, IN)).dtype == linear(torch.randn(2, IN)).dtype


def test_a_layer_made_in_inference_mode_can_be_trained_past_later():
    with torch.inference_mode():
        layer = W8A32LinearLayer(IN, OUT, bias=False).quantize(torch.randn(OUT, IN))
    x = torch.randn(2, IN, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.any()


def test_from_linear_of_a_meta_linear_is_refused():
    with pytest.raises(ModelError, match="meta device"):
        W8A32LinearLayer.from_linear(nn.Linear(IN, OUT, device="meta"))


def test_scales_stay_float32_when_a_half_state_dict_is_assigned():
    layer = W8A32LinearLayer.from_linear(nn.Linear(IN, OUT))
    state = {name: t.half() if t.is_floating_point() else t for name, t in layer.state_dict().items()}
    fresh = W8A32LinearLayer(IN, OUT)
    fresh.load_state_dict(state)
    assert fresh.scales.dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 1), (0, 3), (3, 0)])
def test_layers_of_one_feature_and_of_none_work(shape):
    for kind in FORWARDS:
        layer = kind(*shape[::-1]).quantize(torch.randn(shape))
        assert layer(torch.randn(2, shape[1])).shape == (2, shape[0])
        assert layer.weight.shape == shape
