"""Compares the outputs of what was exported with those of the model, and times both."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from tinyq_lightning.errors import ExportError
from tinyq_lightning.handover.example import flat_names
from tinyq_lightning.handover.outputs import visible
from tinyq_lightning.search import Timing, time_in_turns

__all__ = [
    "OutputError",
    "output_errors",
    "output_tensors",
    "time_both",
    "worst",
]

_ROUNDS = 5
_SECONDS = 0.5


@dataclass(frozen=True)
class OutputError:
    """How far one output is from the model's.

    Attributes:
        name: of the output.
        largest: the largest absolute difference of two values.
        relative: the norm of the difference, relative to the norm of the model's output; of whole numbers and
            booleans the share that differs. Infinite where one has NaN or infinity and the other has not.
    """

    name: str
    largest: float
    relative: float


def output_tensors(outputs: Any) -> dict[str, Tensor]:
    """The tensors of what a model returned, by name, in the order of torch's pytree.

    A single tensor is ``output``; those of a tuple are ``output_0``, …; those of a dict have its keys.

    Raises:
        ExportError: there is none, two have one name, or a sequence is packed.
    """
    leaves = flat_names(visible(outputs), "output")
    for name, leaf in leaves:
        if isinstance(leaf, PackedSequence):
            raise ExportError(
                f"{name} of the model is a PackedSequence, and graphs have none: let a method compute and return "
                "padded sequences, and name it as method="
            )
    named = [(name, leaf) for name, leaf in leaves if isinstance(leaf, Tensor)]
    found = dict(named)
    if len(found) < len(named):
        names = [name for name, _ in named]
        twice = next(name for name in names if names.count(name) > 1)
        raise ExportError(f"two outputs of the model would have the name {twice!r}: give them other keys")
    if not found:
        raise ExportError(
            f"the model returns a {type(outputs).__name__} in which torch finds no tensor: let the exported method "
            "return a tensor, or tuples, lists and dicts of tensors"
        )
    return found


def output_errors(wanted: dict[str, Tensor], got: Sequence[Tensor]) -> list[OutputError]:
    """Compare outputs, in their order.

    Args:
        wanted: of the model.
        got: of what was exported.

    Raises:
        ExportError: they differ in number or shape.
    """
    if len(got) != len(wanted):
        raise ExportError(f"what was exported has {len(got)} outputs, the model {len(wanted)}: {', '.join(wanted)}")
    found = []
    for (name, reference), tensor in zip(wanted.items(), got, strict=True):
        if tensor.shape != reference.shape:
            raise ExportError(
                f"{name} of what was exported has the shape {list(tensor.shape)}, of the model {list(reference.shape)}"
            )
        found.append(_error(name, reference.detach(), tensor.detach()))
    return found


def _error(name: str, wanted: Tensor, got: Tensor) -> OutputError:
    if not wanted.is_floating_point() and not wanted.is_complex():
        differs = (wanted.double() - got.double()).abs()
        share = (differs != 0).double().mean().item() if differs.numel() else 0.0
        return OutputError(name, differs.max().item() if differs.numel() else 0.0, share)
    work = torch.complex128 if wanted.is_complex() else torch.float64
    wanted, got = wanted.to(work), got.to(work)
    same = (wanted == got) | (wanted.isnan() & got.isnan())
    zero = wanted.new_zeros(())
    difference, values = (
        torch.where(same, zero, wanted - got).abs(),
        torch.where(same & ~wanted.isfinite(), zero, wanted),
    )
    if not difference.numel():
        return OutputError(name, 0.0, 0.0)
    largest, norm = difference.max().item(), values.norm().item()
    if not math.isfinite(largest):
        return OutputError(name, math.inf, math.inf)
    gap = difference.norm().item()
    return OutputError(name, largest, gap / norm if norm else (math.inf if gap else 0.0))


def worst(cases: Sequence[Sequence[OutputError]]) -> list[OutputError]:
    """The largest errors of each output over all cases."""
    return [
        OutputError(of_one[0].name, max(each.largest for each in of_one), max(each.relative for each in of_one))
        for of_one in zip(*cases, strict=True)
    ]


def time_both(model: Callable[[], Any], exported: Callable[[], Any]) -> Timing:
    """Median times of one call, taking turns: ``float_ms`` is the model's, ``ms`` that of what was exported."""
    model()
    exported()
    start = time.perf_counter()
    return time_in_turns(
        [(model, exported)], lambda rounds: rounds < _ROUNDS or (rounds < 50 and time.perf_counter() - start < _SECONDS)
    )
