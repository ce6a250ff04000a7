"""Look-ups in embeddings, and sums of them in bags: rows that are read from memory, far apart.

The error is relative L2 of what is looked up against the float rows.
"""

import argparse
import copy

import torch
from contenders import BUILDS, build
from summary import show, summary
from timing import compare
from torch import nn

from tinyq_lightning.table import Table

CONTENDERS = ("float32", "w8a32", "bfloat16")
TABLES = {  # name: class, rows, columns
    "30k × 384": (nn.Embedding, 30_000, 384),
    "500k × 128": (nn.Embedding, 500_000, 128),
    "bags of 20 in 500k × 64": (nn.EmbeddingBag, 500_000, 64),
}
BAG = 20


@torch.inference_mode()
def measure(args: argparse.Namespace) -> list[dict]:
    cells = []
    names = [name for name in CONTENDERS if name in args.contenders and name in BUILDS]
    for name, (kind, rows, columns) in list(TABLES.items())[: 1 if args.quick else None]:
        network = nn.Sequential(kind(rows if not args.quick else 1000, columns)).eval()
        networks, failed = build(names, network)
        for count in (64,) if args.quick else (64, 4096):
            shape = (count, BAG) if kind is nn.EmbeddingBag else (count,)
            index = torch.randint(network[0].num_embeddings, shape)
            wanted = dict.fromkeys(networks, copy.deepcopy(network).double()(index))
            calls = {each: lambda net=net, index=index: net(index) for each, net in networks.items()}
            here = compare(calls, wanted, {}, args, dict.fromkeys(networks, ""))
            column = f"{name}, {count} look-ups"
            show(column, here)
            cells += [{"part": "lookups", "column": column, **cell} for cell in (*failed, *here)]
    return cells


def table(cells: list[dict]) -> tuple[str, Table]:
    return "Look-ups: float32 time / time; error against the float rows", summary(cells)
