"""Whether what runs is being recorded or transformed, so that tensors stand for other tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    "in_jit_trace",
    "in_transform",
    "is_exporting",
    "outside_modes",
]

# torch has no public function for being inside of vmap and its like, and only a slow one for jit.trace.
_in_functorch = torch._C._are_functorch_transforms_active


in_jit_trace = torch._C._is_tracing


def in_transform() -> bool:
    """Return True inside ``torch.jit.trace``, ``torch.vmap`` and other transforms of ``torch.func``, and forward AD."""
    return bool(in_jit_trace() or _in_functorch() or forward_ad._current_level >= 0)


def is_exporting() -> bool:
    """Return True inside ``torch.export``."""
    probe = getattr(torch.compiler, "is_exporting", None)  # since torch 2.7
    return probe is not None and probe()


def outside_modes() -> AbstractContextManager[object]:
    """Return a context manager in which tensors are real, also if a tracer works with fake ones."""
    return _disable_current_modes()
