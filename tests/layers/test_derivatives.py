"""Derivatives through quantized layers, of every order and in every way that torch has."""

import pytest
import torch
from kernel_cases import LARGE, each_method, normal, random_layer, relative_error
from torch.autograd import forward_ad


@each_method
def test_gradients_are_those_of_the_dequantized_linear(kernel, method):
    layer = random_layer(method, 30, 24)
    layer.bias.requires_grad_()
    x, up = normal(4, 3, 24).requires_grad_(), normal(4, 3, 30, seed=7)
    layer(x).backward(up)
    torch.testing.assert_close(x.grad, (up.double() @ layer.dequantize().double()).float())
    torch.testing.assert_close(layer.bias.grad, up.sum((0, 1)))


@each_method
def test_a_bias_that_can_be_trained_changes_no_bit(kernel, method):
    layer = random_layer(method, 30, 24)
    x = normal(4, 24)
    before = layer(x)
    layer.bias.requires_grad_()
    assert torch.equal(layer(x), before)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use of it
def test_forward_mode_derivatives_are_those_of_the_dequantized_linear(kernel):
    layer = random_layer("w8a32", *LARGE)
    x, tangent = normal(4, LARGE[1]), normal(4, LARGE[1], seed=2)
    with torch.no_grad(), forward_ad.dual_level():
        out = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent)))
    assert relative_error(out.tangent, tangent.double() @ layer.dequantize().double().T) < 1e-5


@each_method
def test_a_gradient_makes_no_second_copy(method, monkeypatch):
    monkeypatch.setenv("TINYQ_KERNEL", "float32")
    layer = random_layer(method, 40, 30)
    x = normal(5, 30).requires_grad_()
    layer(x).sum().backward()
    assert relative_error(x.grad, layer.dequantize().double().sum(0).expand(5, -1)) < 1e-6
    copies = [value for value in vars(layer.form("float32")).values() if isinstance(value, torch.Tensor)]
    assert sum(value.dtype == torch.float32 and value.dim() == 2 for value in copies) == 1


@each_method
def test_vmap_and_jit_trace_go_by_the_formula(kernel, method):
    layer = random_layer(method, 30, 24)
    x = normal(4, 5, 24)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(layer)(x), layer(x), rtol=1e-2, atol=1e-2)
