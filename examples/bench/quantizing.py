"""How fast weights are quantized on one thread, beside copying them."""

import argparse
import copy
import statistics
import time

import torch
from timing import spread
from torch import nn

from tinyq_lightning import quantize
from tinyq_lightning.kernels.weights import quantize_per_row
from tinyq_lightning.table import Table

LAYERS = 4


def measure(args: argparse.Namespace) -> list[dict]:
    width = 256 if args.quick else 4096
    network = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))
    weights = [layer.weight.detach() for layer in network]
    copies = [torch.empty_like(weight).fill_(1) for weight in weights]  # pages that are there already
    taken: dict[str, list[float]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(args.rounds):
        fresh = copy.deepcopy(network)
        for name, work in {
            "memcpy": lambda: [to.copy_(weight) for to, weight in zip(copies, weights, strict=True)],
            "quantize_per_row(weight)": lambda: [quantize_per_row(weight) for weight in weights],
            "quantize(model)": lambda fresh=fresh: quantize(fresh, "w8a32"),
        }.items():
            start = time.perf_counter()
            work()
            taken.setdefault(name, []).append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    read = sum(weight.nbytes for weight in weights)
    return [
        {
            "part": "quantizing",
            "contender": name,
            "bytes": read,
            "gb_per_second": read / 1e9 / statistics.median(times),
            "spread": spread(times),
        }
        for name, times in taken.items()
    ]


def table(cells: list[dict]) -> tuple[str, Table]:
    title = "Quantizing: GB/s of float32 weights read, on one thread"
    lines = [[cell["contender"], f"{cell['gb_per_second']:.2f}", f"±{cell['spread']:.0%}"] for cell in cells]
    return title, Table(["", "GB/s", "spread"], lines)
