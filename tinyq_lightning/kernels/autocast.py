"""What autocast asks of a device, as each product asks it before it computes."""

from __future__ import annotations

import torch

__all__ = [
    "autocast_dtype",
]


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return the dtype that autocast computes in on a device of this type, such as ``cpu``; None where it is off."""
    available = device != "meta"  # torch.amp.is_autocast_available cannot be traced before torch 2.8
    return torch.get_autocast_dtype(device) if available and torch.is_autocast_enabled(device) else None
