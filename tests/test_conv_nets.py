"""Whole convolutional networks: a quarter of the bytes, and the metrics of the float network."""

from __future__ import annotations

import copy

import pytest
import torch
from conv_nets import Causal, UNet, mobilenet, resnet18
from sklearn.datasets import load_digits
from torch import nn

from tinyq_lightning import quantized
from tinyq_lightning.kernels import has_int8_convolution

NETS = {
    "resnet18": (resnet18, (1, 3, 64, 64)),
    "unet": (lambda: UNet(32), (1, 1, 32, 32)),
    "mobilenet": (lambda: mobilenet(128), (1, 1, 32, 32)),
    "causal": (lambda: Causal(128), (1, 64)),
}
each_net = pytest.mark.parametrize("name", NETS)


def bytes_of(model):
    return sum(tensor.nbytes for tensor in model.state_dict().values())


@each_net
@pytest.mark.parametrize("method", ["w8a32", "w8a16", "w8a8"])
def test_a_network_of_random_weights_takes_a_quarter_of_the_bytes_and_gives_nearly_the_same(name, method):
    make, shape = NETS[name]
    model, x = make().eval(), torch.rand(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, size = model(x), bytes_of(model)
        with quantized(model, method):
            got = model(x)
            assert bytes_of(model) <= 0.27 * size
    assert (got - wanted).norm() <= (0.05 if method == "w8a8" else 0.03) * wanted.norm()


@pytest.mark.skipif(not has_int8_convolution(), reason="this torch has no int8 convolution for this processor")
@each_net
def test_an_image_has_the_same_bits_in_any_batch(name):
    make, (_, *sizes) = NETS[name]
    model, x = make().eval(), torch.rand(5, *sizes, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), quantized(model, {"method": "w8a8", "kernel": "int8"}):
        assert torch.equal(model(x)[2:3], model(x[2:3]))


@pytest.fixture(scope="module")
def digits():
    """Images ``[1797, 1, 16, 16]`` and labels; the first 1,200 are for training."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    return nn.functional.interpolate(images, scale_factor=2, mode="bilinear"), torch.tensor(labels)


def accuracy(model, x, y):
    with torch.no_grad():
        out = torch.cat([model(part) for part in x.split(200)])
    hit = (out > 0) == (y > 0.5) if out.dim() == 4 else out.argmax(1) == y
    return hit.double().mean().item()


def trained(model, x, y, epochs):
    loss = nn.functional.binary_cross_entropy_with_logits if y.dim() == 4 else nn.functional.cross_entropy
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            loss(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()


TRAINED = {
    "resnet18": (lambda: resnet18(8, 10, (3, 1), 1), 3),
    "mobilenet": (lambda: mobilenet(12), 4),
    "causal": (lambda: Causal(32), 6),
    "unet": (lambda: UNet(8), 2),
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_network_keeps_its_accuracy(name, digits):
    images, labels = digits
    if name == "unet":  # to find the ink in a noisy image
        labels = images
        images = images + 0.5 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    if name == "causal":  # one pixel after the other
        images = nn.functional.avg_pool2d(images, 2)
    make, epochs = TRAINED[name]
    model = trained(make(), images[:1200], labels[:1200], epochs)
    before = copy.deepcopy(model.state_dict())
    x, y = images[1200:], labels[1200:]
    score = accuracy(model, x, y)
    assert score > 0.8
    for method, loss in (("w8a32", 0.003), ("w8a16", 0.003), ("w8a8", 0.01)):
        with quantized(model, method):
            # of 597 images, one is 0.17 points
            assert accuracy(model, x, y) >= score - loss - 1e-9, method
    assert all(torch.equal(each, model.state_dict()[key]) for key, each in before.items())
