"""Look-ups of int8 rows: which form of the table they read."""

from __future__ import annotations

import torch

from tinyq_lightning.kernels.base import Choice
from tinyq_lightning.kernels.choice import wanted_kernel
from tinyq_lightning.kernels.fbgemm_rows import has_fbgemm_rows
from tinyq_lightning.methods import KernelName

__all__ = [
    "choose_lookup_kernel",
]

# To call the operators of a look-up in plain codes takes longer than the one look-up of a few float rows.
_COPIED_TO = 2**20


def choose_lookup_kernel(kernel: KernelName, values: int, dtype: torch.dtype, bits: int = 8) -> Choice:
    """Which form of a table is looked up on the CPU: packed rows, plain codes or a float copy; all give the same bits.

    The environment's ``TINYQ_KERNEL`` goes before what was asked for; ``float32`` copies a table of any size.

    Args:
        kernel: what was asked for.
        values: of the table.
        dtype: floating dtype of what is looked up; a float copy is float32, and of no use to others.
        bits: of a code.

    Raises:
        SpecError: ``TINYQ_KERNEL`` names no kernel.
    """
    wanted = wanted_kernel(kernel)
    if wanted == "reference":
        return Choice("reference", "as asked for")
    if bits == 4 and wanted in ("compact", "int4"):
        return Choice("int4", "half a byte a weight: the rows that are needed are expanded", bytes_a_weight=0.52)
    if dtype == torch.float32 and wanted == "float32":
        return Choice("float32", "a float copy in memory, as asked for", bytes_a_weight=5)
    if dtype != torch.float64 and values and has_fbgemm_rows():
        return Choice("int8-rows", "the rows that are needed, read and expanded in one pass")
    if dtype == torch.float32 and wanted == "auto" and values <= _COPIED_TO:
        return Choice("float32", "a float copy in memory, the fastest for tables this small", bytes_a_weight=5)
    return Choice("reference", "the rows that are needed, each its codes times its scale")
