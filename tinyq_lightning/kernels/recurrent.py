"""Recurrent layers run on float weights: which are kept beside the codes, and which are expanded on each call."""

from __future__ import annotations

from tinyq_lightning.kernels.base import Choice, with_memory
from tinyq_lightning.kernels.choice import wanted_kernel
from tinyq_lightning.kernels.int4 import NibbleWeights
from tinyq_lightning.methods import KernelName

__all__ = [
    "choose_recurrent_kernel",
]


def choose_recurrent_kernel(kernel: KernelName, bits: int = 8) -> Choice:
    """Which kernel a recurrent layer takes: torch's own, on a float copy or on weights expanded on each call.

    The environment's ``TINYQ_KERNEL`` goes before what was asked for. torch has no recurrent kernel that takes int8
    weights and means this project's methods: its dynamic ones round the activations of a whole batch by one scale.

    Args:
        kernel: what was asked for.
        bits: of a weight's code.

    Raises:
        SpecError: ``TINYQ_KERNEL`` names no kernel.
    """
    wanted = wanted_kernel(kernel)
    if wanted in ("auto", "float32"):
        reason = "a float copy in memory, which torch's own kernels take; the file stays small"
        return Choice("float32", reason, bytes_a_weight=5)
    if wanted == "reference":
        return Choice("reference", "as asked for: the weights are expanded on each call")
    if bits == 4 and wanted in ("compact", "int4"):
        reason = "half a byte a weight in memory, expanded on each call, float32 sums"
        return with_memory(Choice("int4", reason), {"int4": NibbleWeights})
    reason = "recurrent layers have no int8 product: one byte a weight in memory, expanded on each call, float32 sums"
    return Choice("reference", reason)
