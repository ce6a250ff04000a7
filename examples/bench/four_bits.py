"""Layers of four bits beside the same of eight, in processor time: they take the same kernels, so the same time.

``kernel: compact`` is the exception: packed codes are expanded on each call. ``again`` is a second layer of eight bits,
which tells what this machine takes for a difference where there is none. The error is relative L2 against the float
layer in float64. Pages lie where they lie, and moods of a machine last: what is to be told apart by 3 % wants
``--rounds 41 --seconds 2``.
"""

import argparse
import copy
import time

import torch
from recurrent import Output
from summary import show, summary
from timing import compare
from torch import nn

from tinyq_lightning import quantize
from tinyq_lightning.table import Table

LAYERS = {  # name: layer, its inputs for some rows
    "Linear 768": (lambda: nn.Linear(768, 768), lambda rows: torch.randn(rows, 768)),
    "Linear 768 → 3072": (lambda: nn.Linear(768, 3072), lambda rows: torch.randn(rows, 768)),
    "Conv2d 64, 3×3": (lambda: nn.Conv2d(64, 64, 3, padding=1), lambda rows: torch.randn(-(-rows // 64), 64, 28, 28)),
    "Embedding 30k × 384": (lambda: nn.Embedding(30_000, 384), lambda rows: torch.randint(30_000, (rows,))),
    "GRU 256": (lambda: Output(nn.GRU(256, 256)), lambda rows: torch.randn(32, -(-rows // 16), 256)),
}
ACTIVATIONS, ROWS = ("a32", "a8"), (1, 16, 256)


def of_pairs(network: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Quantized copies by what they are called, and for each the one that it is compared with."""
    made, over = {}, {}
    for activations in ACTIVATIONS:
        for kernel in ("auto", "compact"):
            suffix = "" if kernel == "auto" else ", kernel: compact"
            base = f"w8{activations}{suffix}"
            for name, bits in ((base, 8), (f"{base} again", 8), (f"w4{activations}{suffix}", 4)):
                made[name], over[name] = nn.Sequential(copy.deepcopy(network)), base
                quantize(made[name], {"method": f"w{bits}{activations}", "kernel": kernel})
    return made, over


@torch.inference_mode()
def measure(args: argparse.Namespace) -> list[dict]:
    cells = []
    for column, (layer, example) in list(LAYERS.items())[: 1 if args.quick else None]:
        network = layer().eval()
        made, over = of_pairs(network)
        for rows in ROWS[: 1 if args.quick else None]:
            x = example(rows)
            wanted = copy.deepcopy(network).double()(x.double() if x.is_floating_point() else x)
            calls = {name: lambda net=net, x=x: net(x) for name, net in made.items()}
            here = compare(calls, dict.fromkeys(calls, wanted), over, args, dict.fromkeys(calls, ""), time.process_time)
            here = [cell for cell in here if cell["contender"] != over[cell["contender"]]]
            show(f"{column}, {rows} rows", here)
            cells += [{"part": "four_bits", "column": column, "rows": rows, **cell} for cell in here]
    return cells


def table(cells: list[dict]) -> tuple[str, Table]:
    title = "Four bits: time of the layer of eight bits and the same kernel / time, geometric mean (worst … best)"
    return title, summary(cells)
