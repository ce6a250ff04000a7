"""The state dict of a quantized file for a hook written for the float one: weights are there when asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tinyq_lightning.file.codes import CODES, columns_of
from tinyq_lightning.kernels import dequantize, expand

__all__ = [
    "FloatEntries",
]


class FloatEntries(OrderedDict[str, Any]):
    """A copy of a quantized state dict that also answers for the float weights, by the names that those had.

    ``state["head.weight"]`` is computed from ``head.int8_weights`` and ``head.scales``. Its keys are those of the file.
    Only weights with a scale for each entry of the first dimension are answered for, and matrices of four bits.

    Args:
        state_dict: quantized or float.
        plan: the decisions, as the file has them.
    """

    def __init__(self, state_dict: Mapping[str, Any] = {}, plan: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(state_dict)
        self._plan = {entry["name"]: entry for entry in plan}
        self._saved = set(state_dict)
        if hasattr(state_dict, "_metadata"):
            self._metadata = state_dict._metadata

    def entries(self) -> OrderedDict[str, Any]:
        """What there is by now, without float weights that were put there beside their codes."""
        kept = (item for item in self.items() if item[0] in self._saved or self._prefix(item[0]) is None)
        entries = OrderedDict(kept)
        if hasattr(self, "_metadata"):
            vars(entries)["_metadata"] = self._metadata
        return entries

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
        entry, scales = super().__getitem__, super().__getitem__(f"{prefix}scales")
        if f"{prefix}{CODES[4]}" in self.keys():
            packed, multipliers = entry(f"{prefix}{CODES[4]}"), entry(f"{prefix}multipliers")
            return dequantize(expand(packed, multipliers, self._columns(prefix)), scales)
        return dequantize(entry(f"{prefix}{CODES[8]}"), scales)

    def _prefix(self, key: str) -> str | None:
        """Of the codes of a float weight: ``head.`` for ``head.weight``, ``a.in_proj.`` for ``a.in_proj_weight``."""
        for prefix in (key.removesuffix("weight"), f"{key}.", f"{key.removesuffix('_weight')}."):
            codes, scales = (super(FloatEntries, self).get(f"{prefix}{each}") for each in (CODES[8], "scales"))
            if isinstance(codes, Tensor) and isinstance(scales, Tensor) and _is_plain(codes, scales):
                return prefix
            if f"{prefix}{CODES[4]}" in self.keys() and self._columns(prefix):
                return prefix
        return None

    def _columns(self, prefix: str) -> int:
        """Of a matrix of four bits; 0 for what is none, or of an unknown size."""
        entry = self._plan.get(prefix[:-1], {})
        entry = self._plan.get(entry.get("tied_to"), entry)
        if not entry or entry["kind"] == "conv":
            return 0
        return columns_of(self, prefix, entry["float_bytes"]) or 0


def _is_plain(codes: Tensor, scales: Tensor) -> bool:
    """Whether each scale is of one entry of the first dimension, and not of the second, as transposed convolutions."""
    square = codes.dim() > 2 and codes.shape[1] == codes.shape[0]
    return scales.numel() == codes.shape[0] and not square
