"""A pretrained text encoder, all-MiniLM-L6-v2 as ``examples/real_models`` has it, on news texts."""

import argparse
import os
import sys
from pathlib import Path

import runtimes
import torch
from contenders import METHODS, build, kernels
from summary import show, summary
from timing import compare
from torch import Tensor, nn

from tinyq_lightning.table import Table

CONTENDERS = ("float32", "float32-onednn", *METHODS, "bfloat16", "torchao-w8", "torchao-w8a8", "torch-w8a8")
SHAPES = [(1, 16), (1, 128), (32, 64)]  # batch, tokens


class Encoder(nn.Module):
    """Token ids ``[batch, tokens]`` to hidden states ``[batch, tokens, 384]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).last_hidden_state


def load() -> tuple[Encoder, Tensor]:
    """The encoder, and token ids of the news: ``[tokens]``.

    Raises:
        ModuleNotFoundError: the model is not installed.
    """
    sys.path.append(str(Path(__file__).parents[1] / "real_models"))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import encoder

    words = encoder.tokenizer()(" ".join(encoder.news()), return_tensors="pt")["input_ids"][0]
    return Encoder(encoder.load().eval()), words


@torch.no_grad()
def measure(args: argparse.Namespace) -> list[dict]:
    try:
        encoder, words = load()
    except ModuleNotFoundError as error:
        failed = f"{error.name} is not installed, see examples/real_models/wheels.py"
        return [{"part": "text_encoder", "contender": "text_encoder", "failed": failed}]
    networks, failed = build([name for name in CONTENDERS if name in args.contenders], encoder)
    in_graphs, more = runtimes.build(encoder, words[: 32 * 64].view(32, 64), [] if args.quick else args.runtimes)
    cells = [{"part": "text_encoder", **cell} for cell in (*failed, *more)]
    for batch, tokens in SHAPES[: 1 if args.quick else None]:
        ids = words[: batch * tokens].view(batch, tokens)
        torch.compiler.reset()  # a graph for each shape
        calls = {name: lambda run=run, ids=ids: run(ids) for name, run in {**networks, **in_graphs}.items()}
        taken = {name: kernels(net, batch * tokens) for name, net in networks.items()} | dict.fromkeys(in_graphs, "")
        here = compare(calls, dict.fromkeys(calls, calls["float32"]().double()), {}, args, taken)
        column = f"{batch} × {tokens}"
        show(f"MiniLM {column}", here)
        place = {"part": "text_encoder", "column": column, "batch": batch, "tokens": tokens}
        cells += [{**place, **cell} for cell in here]
    return cells


def table(cells: list[dict]) -> tuple[str, Table]:
    title = (
        "MiniLM text encoder, batch × tokens: time of torch's eager float32 (`nn.Linear`) / time; "
        "error of the hidden states against it. `bare products`: compiled, with nothing else where linear layers are"
    )
    return title, summary(cells)
