"""Small networks that tests export, each with inputs and the sizes that may change: ``NETS``."""

from importlib.util import find_spec

import pytest
import torch
from conv_nets import UNet, resnet18
from torch import nn

TOKENS = {0: "batch", 1: "tokens"}
HAS_ONNX = all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")) and hasattr(torch.onnx, "ops")
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="needs torch 2.8, onnxscript and onnxruntime")


class Padded(nn.Module):
    """A transformer encoder that is told which tokens are padding, and returns a dict."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 16, padding_idx=0)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)
        for layer in self.encoder.layers:  # torch makes them alike
            for weight in layer.parameters():
                nn.init.normal_(weight, std=0.2)
        self.head = nn.Linear(16, 3)

    def forward(self, ids, padding):
        hidden = self.encoder(self.embed(ids), src_key_padding_mask=padding)
        return {"hidden": hidden, "logits": self.head(hidden[:, 0])}


class Cross(nn.Module):
    """Attention from one input to another, with keys of another size, and its weights."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, kdim=12, vdim=12, batch_first=True)

    def forward(self, x, memory, other):
        return self.attention(self.layer(x, memory), other, other)


class Tied(nn.Module):
    """A decoder whose table of words is its last weight too."""

    def __init__(self):
        super().__init__()
        self.embed, self.middle, self.out = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(torch.tanh(self.middle(self.embed(ids))))


class States(nn.Module):
    """Takes a nested input, and returns the states of its recurrent layers."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True)
        self.gru, self.rnn = nn.GRU(16, 5, batch_first=True), nn.RNN(5, 4, nonlinearity="relu", batch_first=True)

    def forward(self, batch):
        out, states = self.lstm(batch["series"], (batch["h"], batch["c"]))
        return self.rnn(self.gru(out)[0]), states


class Cells(nn.Module):
    """Three steps of each kind of cell."""

    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(6, 8), nn.GRUCell(8, 5), nn.RNNCell(5, 4)

    def forward(self, x):
        state = gru = rnn = None
        for step in range(3):
            state = self.lstm(x[:, step], state)
            gru = self.gru(state[0], gru)
            rnn = self.rnn(gru, rnn)
        return rnn


class Bags(nn.Module):
    """Bags of each kind, with padding."""

    def __init__(self):
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(20, 4, mode=mode, padding_idx=3) for mode in ("sum", "mean", "max"))
        self.weighted = nn.EmbeddingBag(20, 4, mode="sum")

    def forward(self, ids, weights):
        return torch.cat([bag(ids) for bag in self.bags], 1) + self.weighted(ids, per_sample_weights=weights).repeat(
            1, 3
        )


class Convolutions(nn.Module):
    """Groups, dilation, padding of each kind, and transposed convolutions."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.grouped = nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=4)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=(1, 2), padding_mode="circular", bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.up = nn.ConvTranspose2d(12, 8, 3, stride=2, padding=1, output_padding=1)
        self.up_norm = nn.BatchNorm2d(8)
        self.up_grouped = nn.ConvTranspose2d(8, 4, 3, padding=1, groups=2)

    def forward(self, x):
        x = torch.relu(self.grouped(torch.relu(self.first(x))))
        return self.up_grouped(self.up_norm(self.up(torch.relu(self.norm(self.down(x))))))


class Two(nn.Module):
    """Two inputs, a number that is none, and outputs of several kinds."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(4, 16)

    def forward(self, x, y, *, twice=True):
        hidden = self.a(x) + self.b(y) * (2 if twice else 1)
        return {"sum": hidden.sum(-1), "pair": (hidden, hidden.argmax(-1))}


class Experts(nn.Module):
    """Reads a matrix of three dimensions that no layer has."""

    def __init__(self):
        super().__init__()
        self.experts, self.gate = nn.Parameter(torch.randn(3, 8, 16) / 3), nn.Linear(8, 8)

    def forward(self, x):
        return torch.einsum("bi,eio->beo", self.gate(x), self.experts)


def moved_norms(net):
    """The network with norms whose statistics are of some data, with factors of both signs and one of zero."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.bias.data):
                values.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
            module.weight.data[::3] *= -1
            module.weight.data[1] = 0
    return net.eval()


def _padded():
    ids = torch.randint(1, 30, (3, 9))
    ids[1, 5:] = 0
    return Padded(), (ids, ids == 0), TOKENS


def _cross():
    inputs = torch.randn(3, 5, 16), torch.randn(3, 7, 16), torch.randn(3, 6, 12)
    return Cross(), inputs, {"x": TOKENS, "memory": {0: "batch", 1: "others"}, "other": {0: "batch"}}


def _states():
    series, states = torch.randn(3, 7, 6), {name: torch.randn(4, 3, 8) for name in "hc"}
    dims = {"batch.series": {0: "batch", 1: "steps"}, "batch.h": {1: "batch"}, "batch.c": {1: "batch"}}
    return States(), {"batch": {"series": series, **states}}, dims


def _mlp():
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(5, 8), True


NETS = {
    "mlp": _mlp,
    "padded": _padded,
    "cross": _cross,
    "resnet": lambda: (moved_norms(resnet18(8, 10, (3, 1))), torch.randn(2, 3, 16, 16), True),
    "unet": lambda: (moved_norms(UNet(8)), torch.randn(2, 1, 16, 16), True),
    "convolutions": lambda: (moved_norms(Convolutions()), torch.randn(2, 3, 12, 12), True),
    "states": _states,
    "cells": lambda: (Cells(), torch.randn(3, 3, 6), True),
    "bags": lambda: (Bags(), (torch.tensor([[3, 3, 3], [1, 3, 2], [4, 5, 6]]), torch.rand(3, 3)), True),
    "tied": lambda: (Tied(), torch.randint(0, 40, (3, 7)), TOKENS),
    "two": lambda: (Two(), {"y": torch.randn(4, 4), "x": torch.randn(4, 8), "twice": True}, True),
    "experts": lambda: (Experts(), torch.randn(4, 8), True),
}
"""By name, a function: the float network, example inputs, and the sizes that may change."""
