"""Six Linear layers with ReLU between them, eager and compiled: weights that are not in cache when they are needed."""

import argparse
import copy

import torch
from contenders import BFLOAT16, build, kernels
from graphs import compiled_apart
from summary import show, summary
from timing import compare
from torch import nn

from tinyq_lightning.table import Table

LAYERS = 6


@torch.inference_mode()
def measure(args: argparse.Namespace) -> list[dict]:
    names, cells = [name for name in args.contenders if name not in BFLOAT16], []
    if args.quick:
        names = [name for name in names if name in ("float32", "w8a32")]  # compiling takes seconds for each
    for width in (64,) if args.quick else (768, 2048):
        network = nn.Sequential(*(module for _ in range(LAYERS) for module in (nn.Linear(width, width), nn.ReLU())))
        networks, failed = build(names, network)
        cells += [{"part": "chain", "width": width, **cell} for cell in failed]
        for rows in (1,) if args.quick else (1, 64):
            x = torch.randn(rows, width)
            wanted = dict.fromkeys(networks, copy.deepcopy(network).double()(x.double()))
            for mode in ("eager", "compiled"):
                torch.compiler.reset()
                runs = networks if mode == "eager" else {name: compiled_apart(net) for name, net in networks.items()}
                calls = {name: lambda net=net, x=x: net(x) for name, net in runs.items()}
                here = compare(calls, wanted, {}, args, {name: kernels(net, rows) for name, net in networks.items()})
                column = f"{width} wide, {rows} row{'s' * (rows > 1)}, {mode}"
                show(column, here)
                place = {"part": "chain", "column": column, "width": width, "rows": rows, "mode": mode}
                cells += [{**place, **cell} for cell in here]
    return cells


def table(cells: list[dict]) -> tuple[str, Table]:
    title = f"{LAYERS} Linear layers with ReLU: float32 time / time in the same mode; output's error against float64"
    return title, summary(cells)
