"""One layer, shape by shape and batch by batch.

Called again and again, a layer has its weights in cache, which flatters float: the networks tell more.
The error is relative L2 against a float64 product: with the layer's own dequantized weights for this project's
layers, with the weights rounded to int8 per row for peers, with the float weights for float layers.
"""

import argparse

import torch
from contenders import BFLOAT16, METHODS, OVER, build, kernels
from summary import show, summary
from timing import compare
from torch import Tensor, nn

from tinyq_lightning.table import Table

GRIDS = {  # (out_features, in_features)
    "small": [(64, 64), (384, 384), (1536, 384), (384, 1536)],
    "medium": [(768, 768), (3072, 768), (768, 3072), (1024, 1024), (4096, 1024), (1024, 4096)],
    "large": [(4096, 4096), (11008, 4096)],
}


def exact_weight(name: str, network: nn.Module, linear: nn.Linear) -> Tensor:
    """The weights ``[out, in]``, float64, that a contender is meant to multiply with."""
    if name.split("-")[0] in METHODS:
        return network[0].dequantize().double()
    weight = linear.weight.double()
    if name in ("float32", "float32-onednn", "bfloat16"):
        return weight
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp_min(1e-30)
    return (weight / scale).round() * scale


@torch.inference_mode()
def measure(args: argparse.Namespace) -> list[dict]:
    cells = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for grid in args.grid:
            for shape in GRIDS[grid][: 2 if args.quick else None]:
                column = f"{grid}, {threads} thread{'s' * (threads > 1)}"
                cells += [{"part": "layers", "column": column, **cell} for cell in _one_shape(*shape, args)]
    torch.set_num_threads(args.threads[0])
    return cells


def _one_shape(out_features: int, in_features: int, args: argparse.Namespace) -> list[dict]:
    linear = nn.Linear(in_features, out_features)
    shape = {"out": out_features, "in": in_features}
    networks, failed = build(args.contenders, nn.Sequential(linear))
    cells = [{**shape, **cell} for cell in failed]
    weights = {name: exact_weight(name, network, linear) for name, network in networks.items()}
    for rows in args.rows:
        x = torch.randn(rows, in_features)
        inputs = {name: x.bfloat16() if name in BFLOAT16 else x for name in networks}
        calls = {name: lambda net=net, x=inputs[name]: net(x) for name, net in networks.items()}
        wanted = {name: inputs[name].double() @ weights[name].T + linear.bias.double() for name in networks}
        here = compare(calls, wanted, OVER, args, {name: kernels(net, rows) for name, net in networks.items()})
        show(f"{out_features:>5}×{in_features:<5} rows {rows:<4}", here)
        cells += [{**shape, "rows": rows, **cell} for cell in here]
    return cells


def table(cells: list[dict]) -> tuple[str, Table]:
    title = "One layer: float32 `nn.Linear` time / time (w8a16-bfloat16: over bfloat16), geometric mean (worst … best)"
    return title, summary(cells)
