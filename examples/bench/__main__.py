"""What quantized layers cost and gain on this machine, beside float layers and beside peers.

python examples/bench [--parts layers …] [--grid medium …] [--threads 1 …] [--quick] [--json FILE] [--markdown]

layers        one layer, shape by shape, for 1 to 256 rows
chain         six layers in a row, eager and compiled
text_encoder  a pretrained one, as ``examples/real_models`` installs it
memory        what quantizing and a quantized model take
quantizing    GB/s of float32 weights, beside memcpy

Speeds are float32 time / time in one process, above 1 is faster than float: medians of rounds in which all take
turns. The spread is half the distance between the quartiles of the rounds: on a machine with other work to do it
tells which figures to believe. Tables go to standard output, progress to standard error.
Peers come with ``pip install '.[bench]'``; those that are missing, or cannot run a shape, are named at the end.
"""

import argparse
import importlib
import json
import logging
import sys
import warnings

import torch
from contenders import BUILDS, OVER
from layers import GRIDS
from machine import describe

PARTS = ("layers", "chain", "text_encoder", "memory", "quantizing")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--contenders", nargs="+", choices=list(BUILDS), default=list(BUILDS))
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
    warnings.filterwarnings("ignore")  # of peers, about their own code
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads[0])
    machine, cells = {**describe(), "threads": " and ".join(map(str, args.threads))}, []
    print(*(f"{name} {value}" for name, value in machine.items()), sep=", ", end="\n\n")
    for name in args.parts:
        part = importlib.import_module(name)
        with torch.inference_mode():
            found = part.measure(args)
        cells += found
        if any("failed" not in cell for cell in found):
            title, table = part.table(found)
            print(title, table.markdown() if args.markdown else table.text(), sep="\n\n", end="\n\n", flush=True)
    failed = {(cell["contender"], cell["failed"]): None for cell in cells if "failed" in cell}
    for contender, why in failed:
        print(f"skipped: {contender}: {why}", file=sys.stderr)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": machine, "cells": cells}, file, indent=1)


if __name__ == "__main__":
    main()
