"""Convolutions: the layers of ResNet-18 one by one, and whole networks, for images in both orders of memory."""

import argparse
from collections.abc import Callable

import torch
from contenders import METHODS, build
from summary import show, summary
from timing import compare
from torch import Tensor, nn

from tinyq_lightning.layers import QuantizedLayer
from tinyq_lightning.table import Table

CONTENDERS = ("float32", *METHODS, "bfloat16")
LAYERS = [  # channels, outputs, places of the kernel, stride, size of the image
    (3, 64, 7, 2, 224),
    *((64, 64, 3, 1, 56), (64, 128, 3, 2, 56), (64, 128, 1, 2, 56), (128, 128, 3, 1, 28)),
    *((128, 256, 3, 2, 28), (256, 256, 3, 1, 14), (256, 512, 3, 2, 14), (512, 512, 3, 1, 7)),
]


class Residual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        first = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
        self.path = nn.Sequential(*first, nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))
        skip = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.skip = skip if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (self.path(x) + self.skip(x)).relu()


def resnet18() -> nn.Module:
    stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    stages = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
    blocks = (block for first, out, stride in stages for block in (Residual(first, out, stride), Residual(out, out, 1)))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def _layer(channels: int, out: int, width: int, stride: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(channels, out, width, stride, width // 2))


@torch.inference_mode()
def measure(args: argparse.Namespace) -> list[dict]:
    alone = {"layers": [(_layer(*each), (each[0], size, size)) for *each, size in LAYERS[: 2 if args.quick else None]]}
    places = alone | {"ResNet-18": [] if args.quick else [(resnet18, (3, 224, 224))]}
    cells = []
    for name, networks in places.items():
        for make, sizes in networks:
            network = make().eval()
            for batch in (1,) if args.quick else (1, 16):
                for order in (torch.contiguous_format, torch.channels_last):
                    cells += _one(name, network, torch.randn(batch, *sizes), order, args)
    return cells


def _one(name: str, network: nn.Module, x: Tensor, order: torch.memory_format, args: argparse.Namespace) -> list[dict]:
    x = x.contiguous(memory_format=order)
    made, failed = build([each for each in CONTENDERS if each in args.contenders], network.to(memory_format=order))
    wanted = dict.fromkeys(made, network(x).double())
    inputs = {each: x.bfloat16() if each == "bfloat16" else x for each in made}
    calls = {each: lambda net=net, x=inputs[each]: net(x).float() for each, net in made.items()}
    here = compare(calls, wanted, {}, args, {each: _kernels(net) for each, net in made.items()})
    column = f"{name}, batch {len(x)}" + ", channels last" * (order == torch.channels_last)
    show(f"{column} {[*x.shape[1:]]}", here)
    place = {"part": "convolutions", "column": column, "input": list(x.shape)}
    return [{**place, **cell} for cell in (*failed, *here)]


def _kernels(network: nn.Module) -> str:
    layers = [each for each in network.modules() if isinstance(each, QuantizedLayer) and isinstance(each, nn.Conv2d)]
    return ", ".join(sorted({layer.choice.label for layer in layers}))


def table(cells: list[dict]) -> tuple[str, Table]:
    title = "Convolutions: float32 time / time, geometric mean (worst … best); output's error against float32"
    return title, summary(cells)
