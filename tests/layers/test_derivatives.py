"""Derivatives through quantized layers, of every order and in every way that torch has."""

import pytest
import torch
from kernel_cases import LARGE, each_method, normal, random_layer, relative_error
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint


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


def dequantized(layer):
    """The float layer that the codes stand for."""
    linear = nn.Linear(layer.in_features, layer.out_features)
    linear.weight.data, linear.bias.data = layer.dequantize(), layer.bias.data.clone()
    return linear


@each_method
@pytest.mark.parametrize("first", ["packed", "fresh"])
def test_vmap_gives_what_the_layer_gives_for_each_row(kernel, method, first):
    layer = random_layer(method, 30, 24)
    x = normal(4, 5, 24)
    if first == "packed":
        layer(x)
    with torch.no_grad():
        mapped = torch.vmap(layer)(x)
        assert relative_error(mapped, layer(x).double()) < {"w8a32": 1e-6, "w8a16": 1e-4, "w8a8": 1e-6}[method]


def forward_mode(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


DERIVATIVES = {
    "autograd": lambda f, x: torch.autograd.grad(f(leaf := x.clone().requires_grad_()), leaf)[0],
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.tensor(1.0))[0],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "forward mode": forward_mode,
    "vmapped grad": lambda f, x: torch.vmap(torch.func.grad(f))(torch.stack([x, x])),
    "batched grads": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "double backward": lambda f, x: torch.autograd.functional.hessian(f, x),
    "third order": lambda f, x: torch.autograd.functional.hessian(lambda y: torch.func.grad(f)(y).square().sum(), x),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use of it
@pytest.mark.parametrize("derive", DERIVATIVES.values(), ids=DERIVATIVES)
@pytest.mark.parametrize("asked", ["auto", "int8", "reference"])
@each_method
def test_every_derivative_is_that_of_the_dequantized_network(method, asked, derive):
    layers = [random_layer(method, 20, 6), random_layer(method, 1, 20, seed=2)]
    for layer in layers:
        layer.kernel = asked
        layer.scales = layer.scales / 10  # so that tanh is not saturated
    ours = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    floats = nn.Sequential(dequantized(layers[0]), nn.Tanh(), dequantized(layers[1]))
    x = normal(6)
    ours(x)  # the codes are packed from here on
    got, wanted = (derive(lambda y, net=net: net(y).square().sum(), x) for net in (ours, floats))
    assert wanted.abs().sum() > 0
    assert relative_error(got.detach(), wanted.detach().double()) < {"w8a32": 1e-5, "w8a16": 1e-3, "w8a8": 0.1}[method]


@each_method
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("rows", [2, 200])
def test_gradients_under_checkpointing_are_those_without(kernel, method, reentrant, rows):
    layer = random_layer(method, 60, 50)
    x = normal(rows, 50).requires_grad_()
    for _ in range(2):  # the first call packs the weights, in the forward pass or when it is repeated
        grads = []
        for out in checkpoint(layer, x, use_reentrant=reentrant), layer(x):
            x.grad = None
            out.square().sum().backward()
            grads.append(x.grad)
        assert torch.equal(*grads)
