"""Whether what runs is being recorded or transformed, so that tensors stand for other tensors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils import stateless
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    "count_modes",
    "exporting_for_this_processor",
    "in_functional_call",
    "in_functorch",
    "in_jit_trace",
    "in_transform",
    "is_exporting",
    "is_exporting_for_any_processor",
    "is_exporting_for_this_processor",
    "is_mapped",
    "is_recorded",
    "is_same_memory",
    "outside_modes",
    "without_gradient",
]

# torch has no public function for being inside of vmap and its like, and only a slow one for jit.trace.
in_functorch = torch._C._are_functorch_transforms_active


in_jit_trace = torch._C._is_tracing


count_modes = torch._C._len_torch_dispatch_stack


def in_transform() -> bool:
    """Return True inside ``torch.jit.trace``, ``torch.vmap`` and other transforms of ``torch.func``, and forward AD.

    And while ``make_fx`` records with gradients on: its graph has the operators of an autograd function alone, without
    its gradient.
    """
    return bool(in_jit_trace() or in_functorch() or forward_ad._current_level >= 0 or _in_make_fx())


def is_recorded() -> bool:
    """Return True if a graph is made of what runs, a transform changes it, or a mode looks at each operator."""
    # Written out, because a look-up of a few rows asks this, and takes some microseconds.
    return bool(
        torch.compiler.is_compiling()
        or in_jit_trace()
        or in_functorch()
        or forward_ad._current_level >= 0
        or count_modes()
    )


def _in_make_fx() -> bool:
    if not count_modes() or not torch.is_grad_enabled():
        return False
    return torch._C._get_dispatch_mode(_PROXIES) is not None


_PROXIES = torch._C._TorchDispatchModeKey.PROXY


def without_gradient(x: Tensor) -> Tensor:
    """Return ``x.detach()``, also in the graphs of ``make_fx``, where torch 2.14 writes an alias for it."""
    if torch.compiler.is_compiling() or in_functorch() or not _in_make_fx():
        return x.detach()
    return x.view(_INTEGERS[x.itemsize]).view(x.dtype)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def in_functional_call() -> bool:
    """Whether this runs inside of ``torch.func.functional_call``, which hands back what layers hold after the call.

    Torch does not tell but by its frame, so this is for what happens once, not on each call.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _FUNCTIONAL_CALL:
            return True
        frame = frame.f_back
    return False


_FUNCTIONAL_CALL = stateless._functional_call.__code__


def is_mapped(tensor: Tensor) -> bool:
    """Return True if the tensor stands for several, one of which ``torch.vmap`` gives to each call."""
    return bool(torch._C._functorch.is_batchedtensor(tensor))


def is_same_memory(tensor: Tensor, other: Tensor | None) -> bool:
    """Return True if both lie in the same memory, also where a transform of ``torch.func`` has wrapped ``tensor``."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return other is not None and bool(torch._C._is_alias_of(tensor, other))  # type: ignore[attr-defined]


def is_exporting() -> bool:
    """Return True inside ``torch.export``; with torch 2.7 only if it is not strict."""
    return bool(torch.compiler._is_exporting_flag if _COMPILES_AS_EXPORTING else torch.compiler.is_exporting())


# With torch 2.7, `torch.compiler.is_exporting()` is also True while torch.compile traces.
_COMPILES_AS_EXPORTING = torch.__version__.startswith("2.7.")


# One value for all threads, as torch's own flag is while it exports; torch 2.7 cannot trace a ContextVar.
_for_this_processor = [False]


@contextmanager
def exporting_for_this_processor() -> Iterator[None]:
    """Return a context manager in which ``torch.export`` writes the products that are fast on this processor.

    Elsewhere it writes those that mean the same on any processor, unless a layer asks for int8 products.
    """
    before, _for_this_processor[0] = _for_this_processor[0], True
    try:
        yield
    finally:
        _for_this_processor[0] = before


def is_exporting_for_this_processor() -> bool:
    """Return True inside ``torch.export``, if it is :func:`exporting_for_this_processor`."""
    return is_exporting() and _for_this_processor[0]


def is_exporting_for_any_processor() -> bool:
    """Return True inside ``torch.export``, unless it is :func:`exporting_for_this_processor`."""
    return is_exporting() and not _for_this_processor[0]


@contextmanager
def outside_modes() -> Iterator[None]:
    """Return a context manager in which tensors are real, whatever tracer or transform the caller runs in.

    What is made inside can be kept: no tracer records it, no transform of ``torch.func`` wraps it, and it can take part
    in training, also if it is made in inference mode.
    """
    tracing = torch._C._get_tracing_state()  # of jit.trace
    no_modes = _disable_current_modes(), torch._C.DisableTorchFunction(), torch._C._DisableFuncTorch()
    with no_modes[0], no_modes[1], no_modes[2], torch.inference_mode(False), torch.no_grad():
        if tracing is None:
            yield
            return
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]
