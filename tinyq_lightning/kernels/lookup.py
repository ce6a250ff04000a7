"""Look-ups of int8 rows: of which tables a float copy is kept beside the codes."""

from __future__ import annotations

from tinyq_lightning.kernels.base import Choice
from tinyq_lightning.kernels.choice import wanted_kernel
from tinyq_lightning.methods import KernelName

__all__ = [
    "choose_lookup_kernel",
]

# To call the four operators of a look-up in codes takes longer than the one look-up of a few float rows.
_COPIED_TO = 2**20


def choose_lookup_kernel(kernel: KernelName, values: int) -> Choice:
    """Whether a table is looked up in a float copy or in its codes; both give the same bits.

    The environment's ``TINYQ_KERNEL`` goes before what was asked for.

    Args:
        kernel: what was asked for.
        values: of the table.

    Raises:
        SpecError: ``TINYQ_KERNEL`` names no kernel.
    """
    wanted = wanted_kernel(kernel)
    if wanted in ("auto", "float32") and values <= _COPIED_TO:
        return Choice("float32", "a float copy in memory, the fastest for tables this small", bytes_a_weight=5)
    return Choice("reference", "the rows that are needed, each its codes times its scale")
