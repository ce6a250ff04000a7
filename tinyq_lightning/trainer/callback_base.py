"""The base of every callback of ours: one class for the Trainers of both packages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinyq_lightning.namespaces import of_both

__all__ = [
    "CallbackOfBoth",
]

if TYPE_CHECKING:
    from lightning.pytorch import Callback as CallbackOfBoth
else:
    CallbackOfBoth = of_both("Callback")
