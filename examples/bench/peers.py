"""Other packages' int8 on a CPU: each takes a float32 network and returns a quantized copy, or fails to import.

They are timed in eval mode, as they serve: in training mode bitsandbytes rebuilds float weights instead of computing in
int8, which is faster here, and more exact.
"""

import copy

import torch
from torch import nn


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
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(network), {nn.Linear, nn.LSTM, nn.GRU}, torch.qint8)
