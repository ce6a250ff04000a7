"""What calibration brings pretrained models: the error of each layer's outputs on data that it never saw, and scores.

python examples/real_models/calibrated.py [--models encoder dna digits phonemes] [--method w4a32] [--shuffle SEED]

Of the batches that a model is scored on, 16 are to calibrate by and 16 others to compare outputs on: spread evenly,
or drawn at random. Where samples are told right or wrong, those that calibration changes are counted, with the
probability that chance makes them as uneven (McNemar's exact test).
"""

import argparse
import copy
import importlib
import math
import os
import random
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from tinyq_lightning import quantize
from tinyq_lightning.table import Table

BATCHES = 16


def batches_of(model: nn.Module, score: Any) -> list[Any]:
    """What a model is called with while it is scored: at most 64 samples each."""
    found: list[Any] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Tensor]) -> None:
        found.extend([kwargs] if kwargs else [(args[0][at : at + 64],) for at in range(0, len(args[0]), 64)])

    with model.register_forward_pre_hook(note, with_kwargs=True):
        score(model)
    return found


def some(batches: list[Any]) -> list[Any]:
    """A few of them, evenly spread."""
    return [batches[index * len(batches) // BATCHES] for index in range(min(BATCHES, len(batches)))]


def output_errors(model: nn.Module, quantized: nn.Module, layers: list[str], batches: list[Any]) -> dict[str, float]:
    """By layer, the squared error of its outputs, given the inputs that it has in the float model."""
    errors = dict.fromkeys(layers, 0.0)

    def compare(name: str, _: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        change = values(quantized.get_submodule(name)(*args)) - values(out)
        errors[name] += change.double().square().sum().item()

    handles = [model.get_submodule(name).register_forward_hook(partial(compare, name)) for name in layers]
    for batch in batches:
        model(**batch) if isinstance(batch, dict) else model(*batch)
    for handle in handles:
        handle.remove()
    return errors


def values(output: Any) -> Tensor:
    """Those of an output, of a recurrent layer the first, packed or not."""
    return values(output[0]) if isinstance(output, tuple) else output


def changed(plain: Tensor, calibrated: Tensor) -> str:
    """What calibration changes of the samples that are told right, and McNemar's exact test of it, two-sided."""
    lost, gained = (plain & ~calibrated).sum().item(), (calibrated & ~plain).sum().item()
    both = lost + gained
    tail = sum(math.comb(both, count) for count in range(min(lost, gained) + 1)) / 2**both
    return f"{lost} lost, {gained} gained, p = {min(1.0, 2 * tail):.2f}"


@torch.no_grad()
def measure(
    name: str, method: str, shuffle: int | None = None
) -> tuple[list[float], list[dict[str, float]], list[str]]:
    """What is left of each layer's error; of the float model, without and with calibration, scores and what changed."""
    source = importlib.import_module(name)
    model = source.load().eval()
    batches, plain, calibrated = batches_of(model, source.score), copy.deepcopy(model), copy.deepcopy(model)
    if shuffle is not None:
        random.Random(shuffle).shuffle(batches)
    quantize(plain, method)
    plan = quantize(calibrated, method, calibration=some(batches[::2]))
    layers = [decision.name for decision in plan if decision.output_error is not None]
    before, after = (output_errors(model, each, layers, some(batches[1::2])) for each in (plain, calibrated))
    scores = [source.score(each) for each in (model, plain, calibrated)]
    alike: list[str] = []
    if hasattr(source, "right"):
        told = [source.right(each) for each in (model, plain, calibrated)]
        alike = ["", *(f"{(each == told[0]).sum()} of {len(each)}" for each in told[1:])]
        alike[2] += f"; {changed(*told[1:])}"
    return [after[each] / before[each] for each in layers], scores, alike


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["encoder", "dna", "digits", "phonemes"])
    parser.add_argument("--method", default="w4a32")
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="calibrate by other batches")
    args, rows = parser.parse_args(), []
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for name in args.models:
        left, scores, alike = measure(name, args.method, args.shuffle)
        rows.append([name, f"error of {len(left)} layers", "", "1", f"{median(left):.2f}, at most {max(left):.2f}"])
        rows += [[name, score, *(f"{each[score]:.4f}" for each in scores)] for score in scores[0]]
        rows += [[name, "right or wrong as float", *alike]] if alike else []
    print(Table(["model", "", "float", args.method, "calibrated"], rows, left=2).text())
