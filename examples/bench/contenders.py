"""Those that are timed: float layers, this project's methods, and peers. Each build returns a quantized copy."""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from tinyq_lightning import quantize

METHODS = ("w8a32", "w8a16", "w8a8")


def method(name: str, network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network)
    quantize(network, name)
    return network


def torchao(config: str, network: nn.Module) -> nn.Module:
    import torchao.quantization

    network = copy.deepcopy(network)
    torchao.quantization.quantize_(network, getattr(torchao.quantization, config)())
    return network


def quanto(network: nn.Module) -> nn.Module:
    from optimum import quanto

    network = copy.deepcopy(network)
    quanto.quantize(network, weights=quanto.qint8)
    quanto.freeze(network)
    return network


def bitsandbytes(network: nn.Module) -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    network = copy.deepcopy(network)
    for name, linear in list(network.named_modules()):
        if isinstance(linear, nn.Linear):
            bias = linear.bias is not None
            layer = Linear8bitLt(linear.in_features, linear.out_features, bias, has_fp16_weights=False)
            layer.load_state_dict(linear.state_dict())
            network.set_submodule(name, layer.to("cpu"))
    return network


def torch_dynamic(network: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(network), {nn.Linear}, torch.qint8)


BUILDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "float32": copy.deepcopy,
    **{name: partial(method, name) for name in METHODS},
    "bfloat16": lambda network: copy.deepcopy(network).bfloat16(),
    "w8a16-bfloat16": lambda network: method("w8a16", copy.deepcopy(network).bfloat16()),
    "torchao-w8": partial(torchao, "Int8WeightOnlyConfig"),
    "torchao-w8a8": partial(torchao, "Int8DynamicActivationInt8WeightConfig"),
    "quanto-w8": quanto,
    "bnb-w8a8": bitsandbytes,
    "torch-w8a8": torch_dynamic,
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
