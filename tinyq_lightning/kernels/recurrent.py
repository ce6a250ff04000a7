"""Recurrent layers run on float weights: which are kept beside the codes, and which are expanded on each call."""

from __future__ import annotations

from tinyq_lightning.kernels.base import Choice
from tinyq_lightning.kernels.choice import wanted_kernel
from tinyq_lightning.methods import KernelName

__all__ = [
    "choose_recurrent_kernel",
]


def choose_recurrent_kernel(kernel: KernelName) -> Choice:
    """Which kernel a recurrent layer takes: torch's own, on a float copy or on weights expanded on each call.

    The environment's ``TINYQ_KERNEL`` goes before what was asked for. No int8 product pays here: each step multiplies
    one row for each sequence, and the rows of the next step depend on its result.

    Args:
        kernel: what was asked for.

    Raises:
        SpecError: ``TINYQ_KERNEL`` names no kernel.
    """
    wanted = wanted_kernel(kernel)
    if wanted in ("auto", "float32"):
        return Choice("float32", "a float copy in memory, which torch's own kernels take; the file stays int8")
    if wanted == "reference":
        return Choice("reference", "as asked for: the weights are expanded on each call")
    return Choice("reference", "recurrent layers have no int8 product: one byte a weight, expanded on each call")
