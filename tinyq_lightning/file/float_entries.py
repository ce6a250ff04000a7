"""The state dict of a quantized file for a hook written for the float one: weights are there when asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tinyq_lightning.kernels import dequantize

__all__ = [
    "FloatEntries",
]


class FloatEntries(OrderedDict[str, Any]):
    """A copy of a quantized state dict that also answers for the float weights, by the names that those had.

    ``state["head.weight"]`` is computed from ``head.int8_weights`` and ``head.scales``. Its keys are those of the file.
    Only weights with a scale for each entry of the first dimension are answered for.

    Args:
        state_dict: quantized or float.
    """

    def __init__(self, state_dict: Mapping[str, Any] = {}) -> None:
        super().__init__(state_dict)
        if hasattr(state_dict, "_metadata"):
            self._metadata = state_dict._metadata

    def __missing__(self, key: str) -> Tensor:
        weight = self._float_weight(key)
        if weight is None:
            raise KeyError(key)
        return weight

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or (isinstance(key, str) and self._prefix(key) is not None)

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict; the float weight where the file has its codes."""
        try:
            return self[key]
        except KeyError:
            return default

    def _float_weight(self, key: str) -> Tensor | None:
        prefix = self._prefix(key)
        if prefix is None:
            return None
        return dequantize(super().__getitem__(f"{prefix}int8_weights"), super().__getitem__(f"{prefix}scales"))

    def _prefix(self, key: str) -> str | None:
        """Of the codes of a float weight: ``head.`` for ``head.weight``, ``a.in_proj.`` for ``a.in_proj_weight``."""
        for prefix in (key.removesuffix("weight"), f"{key}.", f"{key.removesuffix('_weight')}."):
            codes, scales = (super(FloatEntries, self).get(f"{prefix}{each}") for each in ("int8_weights", "scales"))
            if isinstance(codes, Tensor) and isinstance(scales, Tensor) and _is_plain(codes, scales):
                return prefix
        return None


def _is_plain(codes: Tensor, scales: Tensor) -> bool:
    """Whether each scale is of one entry of the first dimension, and not of the second, as transposed convolutions."""
    square = codes.dim() > 2 and codes.shape[1] == codes.shape[0]
    return scales.numel() == codes.shape[0] and not square
