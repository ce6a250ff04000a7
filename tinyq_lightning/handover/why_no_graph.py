"""Why torch.export cannot make a graph of a model, and what to write instead."""

from __future__ import annotations

import os
import sys
import sysconfig
import traceback
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from tinyq_lightning.handover.onnx_recurrent import SequenceForm
from tinyq_lightning.handover.request import Request

__all__ = [
    "why_no_graph",
]

_TORCH = os.path.dirname(os.path.abspath(torch.__file__))
_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PATHS = sysconfig.get_paths()


def why_no_graph(request: Request, error: Exception) -> str:
    """The reason and the advice. What the model merely holds may not be the reason: torch's own words stand beside it.

    Args:
        request: what was to be exported.
        error: what torch, or the model while it was traced, raised.
    """
    place = _place(request, error)
    own = f"{type(error).__name__}: {_shortened(str(error))}{place}{_advice(request)}"
    scripted = [name for name, each in request.module.named_modules() if isinstance(each, torch.jit.ScriptModule)]
    if scripted:
        return (
            f"{scripted[0]} is a scripted module, of which torch.export takes none: have it as a Python module. torch "
            f"itself says: {own}"
        )
    if _packs(request):
        return (
            f"it packs sequences{place}, and a graph cannot take sizes from the values of the lengths. Run the "
            "layer over the padded sequences: in one direction, what is behind the end of a sequence changes nothing "
            "before it, and `out[torch.arange(x.shape[0]), lengths - 1]` is the output at the end of each. "
            f"torch itself says: {own}"
        )
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        return (
            "it takes a branch or a size from the values of a tensor (if, while, int(x), x.item())"
            f"{place}, and a graph is the same for all values: write torch.where, or export a method without it"
        )
    if type(error).__name__ == "UncapturedHigherOrderOpError":
        return (
            f"a branch of torch.cond holds what ONNX has no graph for, such as a quantized layer{place}: compute both "
            f"branches and choose by torch.where, or leave the layers in them float. torch itself says: {own}"
        )
    if name := _lengths_of_recurrent(request):
        runs_own = getattr(request.module.get_submodule(name), "forward_is_own", False)
        others = (
            "its forward is the user's own, which is traced as it is"
            if runs_own
            else "in ONNX and OpenVINO files quantized ones take any"
        )
        return (
            f"torch.export makes recurrent layers such as {name} for one length of sequence: leave that dimension "
            f"out of dynamic and pad to one length ({others}). torch itself says: {own}"
        )
    return own


def _lengths_of_recurrent(request: Request) -> str | None:
    """The name of a recurrent layer that torch exports, of a graph of which more than the batch may change."""
    several = any(len(places) > 1 for places in request.dims.places.values())
    modules = request.module.named_modules()
    found = (name for name, each in modules if isinstance(each, nn.RNNBase) and not isinstance(each, SequenceForm))
    return next(found, None) if several else None


def _packs(request: Request) -> bool:
    """Whether a layer of the model is given a PackedSequence."""
    packs = False

    def look(_: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal packs
        packs = packs or any(isinstance(each, PackedSequence) for each in args)

    hooks = [each.register_forward_pre_hook(look) for each in request.module.modules()]
    example = request.example.fresh()
    try:
        with torch.no_grad(), suppress(Exception):  # the sizes that are traced may be what it fails for
            request.module(*example.args, **example.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return packs


def _place(request: Request, error: Exception) -> str:
    """Where the model was when it failed: the last line in a file of its classes, or else in code of the user's."""
    frames = [each for each in traceback.extract_tb(error.__traceback__) if _is_users(each.filename)]
    modules = {type(each).__module__ for each in request.module.modules()}
    files = {getattr(sys.modules.get(name), "__file__", None) for name in modules}
    found = [each for each in frames if each.filename in files] or frames
    return f", at {os.path.basename(found[-1].filename)}:{found[-1].lineno}" if found else ""


def _is_users(path: str) -> bool:
    """Whether a file is there and neither torch's, nor of this package, nor of the standard library."""
    installed = path.startswith((_PATHS["purelib"] + os.sep, _PATHS["platlib"] + os.sep))
    of_python = path.startswith(_PATHS["stdlib"] + os.sep) and not installed
    return os.path.isfile(path) and not of_python and not path.startswith((_TORCH + os.sep, _HERE + os.sep))


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
