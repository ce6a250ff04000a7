"""What quantized layers cost and gain on this machine, beside float layers and beside peers.

python examples/bench [--parts layers …] [--grid medium …] [--threads 1 …] [--quick] [--json FILE] [--markdown]

layers        one layer, shape by shape, for 1 to 256 rows; ``chain``: six in a row, eager and compiled
four_bits     layers of four bits beside those of eight, with the kernels of both
recurrent     LSTM, GRU, RNN and a cell over sequences; ``lookups``: rows of embeddings, and bags of them
convolutions  those of ResNet-18; ``text_encoder``: a pretrained one, as ``examples/real_models`` installs it
handover      that encoder exported in each format: size, speed, error and memory beside float32 in the same runtime
memory        what quantizing and a quantized model take; ``quantizing``: GB/s of float32 weights, beside memcpy

Speeds are float32 time / time, above 1 is faster: medians of rounds in which all take turns. The spread, half the
distance between the rounds' quartiles, tells which figures to believe. Peers come with ``pip install '.[bench]'``.
"""

import argparse
import importlib
import json
import logging
import os
import sys
import warnings
from collections import Counter

import runtimes
import torch
from contenders import BUILDS, OVER
from layers import GRIDS
from machine import describe

PARTS = (
    "layers",
    "chain",
    "four_bits",
    "convolutions",
    "recurrent",
    "lookups",
    "text_encoder",
    "handover",
    "memory",
    "quantizing",
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--contenders", nargs="+", choices=list(BUILDS), default=list(BUILDS))
    choices = list(runtimes.BUILDS)
    parser.add_argument("--runtimes", nargs="*", choices=choices, default=choices, help="for the text encoder")
    parser.add_argument("--grid", nargs="+", choices=list(GRIDS), default=["medium"], help="shapes of layers")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64, 256], help="of the batch, for layers")
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="for layers; all else takes the first")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.2, help="for each figure, in all its rounds")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, under a minute: to see that it works")
    parser.add_argument("--json", metavar="FILE", help="write every figure there")
    parser.add_argument("--markdown", action="store_true", help="tables as the README has them")
    args = parser.parse_args()
    if args.quick:
        args.grid, args.rows, args.rounds, args.seconds = ["small"], [1, 16], 3, 0.01
    needed = {"float32", *args.contenders, *(OVER[name] for name in args.contenders if name in OVER)}
    args.contenders = [name for name in BUILDS if name in needed]
    return args


def main() -> None:
    args = arguments()
    with open(args.json or os.devnull, "w") as file:  # not when all is measured: the path may be wrong
        json.dump(measure(args), file, indent=1)


def measure(args: argparse.Namespace) -> dict:
    """Every figure, printed in tables as it is had."""
    warnings.filterwarnings("ignore")  # of peers, about their own code
    logging.disable(logging.WARNING), torch.manual_seed(0)
    torch.set_num_threads(args.threads[0])
    machine, cells = {**describe(), "threads": " and ".join(map(str, args.threads))}, []
    print(*(f"{name} {value}" for name, value in machine.items()), sep=", ", end="\n\n")
    for name in args.parts:
        part = importlib.import_module(name)
        cells += (found := part.measure(args))
        if any("failed" not in cell for cell in found):
            title, table = part.table(found)
            print(title, table.markdown() if args.markdown else table.text(), sep="\n\n", end="\n\n", flush=True)
    failed = Counter((cell["contender"], cell["failed"]) for cell in cells if "failed" in cell)
    for (contender, why), times in failed.items():
        print(f"skipped, {times}×: {contender}: {why}", file=sys.stderr)
    return {"machine": machine, "cells": cells}


if __name__ == "__main__":
    main()
