"""Why torch.export cannot make a graph of a model, and what to write instead."""

from __future__ import annotations

import os
import traceback
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from tinyq_lightning.handover.request import Request

__all__ = [
    "why_no_graph",
]

_TORCH, _HERE = (os.path.dirname(os.path.abspath(each)) for each in (torch.__file__, os.path.dirname(__file__)))


def why_no_graph(request: Request, error: Exception) -> str:
    """The reason and the advice.

    Args:
        request: what was to be exported.
        error: what torch, or the model while it was traced, raised.
    """
    scripted = [name for name, each in request.module.named_modules() if isinstance(each, torch.jit.ScriptModule)]
    if scripted:
        return f"{scripted[0]} is a scripted module, of which torch.export takes none: have it as a Python module"
    if _packs(request):
        return (
            f"it packs sequences{_place(error)}, and a graph cannot take sizes from the values of the lengths. Run the "
            "layer over the padded sequences: in one direction, what is behind the end of a sequence changes nothing "
            "before it, and `out[torch.arange(x.shape[0]), lengths - 1]` is the output at the end of each"
        )
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        return (
            "it takes a branch or a size from the values of a tensor (if, while, int(x), x.item())"
            f"{_place(error)}, and a graph is the same for all values: write torch.where, or export a method without it"
        )
    return f"{type(error).__name__}: {_shortened(str(error))}{_place(error)}{_advice(request)}"


def _packs(request: Request) -> bool:
    """Whether a layer of the model is given a PackedSequence."""
    given = list[Any]()
    hooks = [each.register_forward_pre_hook(lambda _, args: given.extend(args)) for each in request.module.modules()]
    example = request.example.fresh()
    try:
        request.module(*example.args, **example.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return any(isinstance(each, PackedSequence) for each in given)


def _place(error: Exception) -> str:
    """Where the model was when it failed: the last line of code that is neither torch's nor of this package."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if os.path.isfile(frame.filename) and not frame.filename.startswith((_TORCH + os.sep, _HERE + os.sep)):
            return f", at {os.path.basename(frame.filename)}:{frame.lineno}"
    return ""


def _shortened(message: str) -> str:
    """The first lines of an error of torch, without its advice on logging."""
    lines = [line.partition("For more information")[0].strip() for line in message.splitlines()]
    return " ".join([line for line in lines if line][:2])[:400].rstrip(".")


def _advice(request: Request) -> str:
    if not request.dims.places:
        return ""
    return (
        ". The model must not make a number of a size that changes: x.shape[0] stays a size, len(x) and int(…) do not. "
        f"If the sizes of {', '.join(request.dims.names)} may not change, give dynamic=False, or name only the "
        "dimensions that may, with their bounds as torch.export.Dim has them"
    )
