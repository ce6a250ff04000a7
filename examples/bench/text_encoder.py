"""A pretrained text encoder, all-MiniLM-L6-v2 as ``examples/real_models`` has it, on news texts."""

import argparse
import os
import sys
from pathlib import Path

import torch
from contenders import METHODS, build, kernels
from summary import show, summary
from timing import compare

from tinyq_lightning.table import Table

CONTENDERS = ("float32", *METHODS, "torch-w8a8")
SHAPES = [(1, 16), (1, 128), (32, 64)]  # batch, tokens


@torch.inference_mode()
def measure(args: argparse.Namespace) -> list[dict]:
    sys.path.append(str(Path(__file__).parents[1] / "real_models"))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import text

        words = text.tokenizer()(" ".join(text.news()), return_tensors="pt")["input_ids"][0]
        model = text.load().eval()
    except ModuleNotFoundError as error:
        failed = f"{error.name} is not installed, see examples/real_models/wheels.py"
        return [{"part": "text_encoder", "contender": "text_encoder", "failed": failed}]
    networks, failed = build([name for name in CONTENDERS if name in args.contenders], model)
    cells = [{"part": "text_encoder", **cell} for cell in failed]
    for batch, tokens in SHAPES[: 1 if args.quick else None]:
        ids = words[: batch * tokens].view(batch, tokens)
        calls = {name: lambda net=net, ids=ids: net(input_ids=ids).last_hidden_state for name, net in networks.items()}
        taken = {name: kernels(net, batch * tokens) for name, net in networks.items()}
        here = compare(calls, dict.fromkeys(networks, calls["float32"]().double()), {}, args, taken)
        column = f"{batch} × {tokens}"
        show(f"MiniLM {column}", here)
        place = {"part": "text_encoder", "column": column, "batch": batch, "tokens": tokens}
        cells += [{**place, **cell} for cell in here]
    return cells


def table(cells: list[dict]) -> tuple[str, Table]:
    title = "MiniLM text encoder, batch × tokens: float32 time / time; error of the hidden states against float32"
    return title, summary(cells)
