"""Those that are timed: float layers, this project's methods, and peers."""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import peers
import torch
from torch import Tensor, nn

from tinyq_lightning import quantize
from tinyq_lightning.layers.linear import QuantizedLinear

METHODS = ("w8a32", "w8a16", "w8a8")


def method(name: str, network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network)
    quantize(network, name)
    return network


class OnednnLinear(nn.Module):
    """``nn.Linear`` by oneDNN on weights that it has packed: the faster of torch's two floats on many processors."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed, self.bias = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach()), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def packed_float(network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear):
            network.set_submodule(name, OnednnLinear(layer))
    return network


# Each takes a float32 network and returns a copy of it.
BUILDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "float32": copy.deepcopy,
    "float32-onednn": packed_float,
    **{name: partial(method, name) for name in METHODS},
    "bfloat16": lambda network: copy.deepcopy(network).bfloat16(),
    "w8a16-bfloat16": lambda network: method("w8a16", copy.deepcopy(network).bfloat16()),
    "torchao-w8": partial(peers.torchao, "Int8WeightOnlyConfig"),
    "torchao-w8a8": partial(peers.torchao, "Int8DynamicActivationInt8WeightConfig"),
    "quanto-w8": peers.quanto,
    "bnb-w8a8": peers.bitsandbytes,
    "torch-w8a8": peers.torch_dynamic,
}

OVER = {"w8a16-bfloat16": "bfloat16"}
"""Whose time a contender's ratio is over, where it is not float32's."""

BFLOAT16 = ("bfloat16", "w8a16-bfloat16")
"""Those that take bfloat16 inputs."""


def build(names: Sequence[str], network: nn.Module) -> tuple[dict[str, nn.Module], list[dict]]:
    """Each contender's copy of ``network`` in eval mode, and a cell for each that cannot be made, with the reason."""
    made, failed = {}, []
    for name in names:
        try:
            made[name] = BUILDS[name](network).eval()
        except Exception as failure:
            failed.append({"contender": name, "failed": f"{type(failure).__name__}: {failure}".splitlines()[0]})
    return made, failed


def kernels(network: nn.Module, rows: int) -> str:
    """What the quantized layers of a network compute ``rows`` rows with; empty where none is this project's."""
    choices = [layer.choice for layer in network.modules() if isinstance(layer, QuantizedLinear)]
    return ", ".join(sorted({choice.few if rows < choice.few_rows else choice.kernel for choice in choices}))
