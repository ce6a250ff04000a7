"""Recurrent layers over sequences, and cells step by step; eager, because torch compiles no recurrent layers.

The error is relative L2 of the outputs against float64 ones of the float weights.
"""

import argparse
import copy

import torch
from contenders import build
from summary import show, summary
from timing import compare
from torch import Tensor, nn

from tinyq_lightning import quantize
from tinyq_lightning.layers import QuantizedRecurrent
from tinyq_lightning.table import Table

CONTENDERS = ("float32", "w8a32", "bfloat16", "torch-w8a8")
LAYERS = {  # name: class, input size, hidden size, settings
    "LSTM 64": (nn.LSTM, 64, 64, {}),
    "LSTM 512": (nn.LSTM, 256, 512, {}),
    "LSTM 256, 2 layers both ways": (nn.LSTM, 256, 256, {"num_layers": 2, "bidirectional": True}),
    "GRU 256": (nn.GRU, 256, 256, {}),
    "RNN 256": (nn.RNN, 256, 256, {}),
    "LSTMCell 256": (nn.LSTMCell, 256, 256, {}),
}
STEPS = 32


class Output(nn.Module):
    """A recurrent layer's output alone; of a cell, that of its last step."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.layer, nn.LSTMCell):
            return self.layer(x)[0]
        state = None
        for step in x:
            state = self.layer(step, state)
        return state[0]


def kept_packed(network: nn.Module) -> nn.Module:
    """One byte a weight in memory: the float weights are expanded on each call."""
    network = copy.deepcopy(network)
    quantize(network, {"method": "w8a32", "kernel": "int8"})
    return network


def kernel(network: nn.Module) -> str:
    return ", ".join({each.choice.kernel for each in network.modules() if isinstance(each, QuantizedRecurrent)})


@torch.inference_mode()
def measure(args: argparse.Namespace) -> list[dict]:
    cells = []
    names = [name for name in CONTENDERS if name in args.contenders]
    for name, (kind, size, hidden, settings) in list(LAYERS.items())[: 1 if args.quick else None]:
        network = Output(kind(size, hidden, **settings)).eval()
        networks, failed = build(names, network)
        networks["w8a32, kernel: int8"] = kept_packed(network)
        for batch in (1,) if args.quick else (1, 16):
            column = f"{name}, batch {batch}"
            x = torch.randn(STEPS, batch, size)
            wanted = dict.fromkeys(networks, copy.deepcopy(network).double()(x.double()))
            inputs = {each: x.bfloat16() if each == "bfloat16" else x for each in networks}
            calls = {each: lambda net=net, x=inputs[each]: net(x) for each, net in networks.items()}
            here = compare(calls, wanted, {}, args, {each: kernel(net) for each, net in networks.items()})
            show(column, here)
            cells += [{"part": "recurrent", "column": column, **cell} for cell in (*failed, *here)]
    return cells


def table(cells: list[dict]) -> tuple[str, Table]:
    return f"Recurrent layers, {STEPS} steps: float32 time / time; output's error against float64", summary(cells)
