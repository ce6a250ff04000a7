"""Float copies of weights that are held as codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from tinyq_lightning.kernels import dequantize, outside_modes, version_of

__all__ = [
    "FloatCopies",
]


class FloatCopies:
    """Float weights expanded from codes and scales, kept as long as these do not change.

    Args:
        buffers: of the layer.
        keys: of those that the weights come from.
        coded: codes and scales of each weight, by its name.
        dtype: of the float weights.

    Attributes:
        weights: ``[rows, columns]`` of ``dtype`` by name; plain tensors that nobody writes to.
        dtype: as above.
        layer: what runs on them, for whoever made it; None until somebody has.
    """

    layer: nn.Module | None = None

    def __init__(
        self,
        buffers: Mapping[str, Tensor | None],
        keys: Sequence[str],
        coded: Mapping[str, tuple[Tensor, Tensor]],
        dtype: torch.dtype,
    ) -> None:
        sources = [cast(Tensor, buffers[key]) for key in keys]
        self.dtype = dtype
        self._sources = [(key, each, version_of(each)) for key, each in zip(keys, sources, strict=True)]
        with outside_modes():
            self.weights = {name: dequantize(codes, scales, dtype) for name, (codes, scales) in coded.items()}

    def is_current(self, buffers: Mapping[str, Tensor | None], dtype: torch.dtype) -> bool:
        """Return True if ``buffers`` are those that the copies were made from, with nothing written to them since."""
        if dtype is not self.dtype:
            return False
        # A loop, because cells ask this at each step of a sequence, and a microsecond counts.
        for key, tensor, version in self._sources:
            if buffers[key] is not tensor or (version >= 0 and tensor._version != version):
                return False
        return True
