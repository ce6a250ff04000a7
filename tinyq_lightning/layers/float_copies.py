"""Float copies of weights that are held as codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from tinyq_lightning.kernels import dequantize, outside_modes, version_of

__all__ = [
    "FloatCopies",
    "StandIn",
    "version_counter",
]

version_counter = torch._C.TensorBase._version.__get__  # type: ignore[attr-defined]
"""``tensor._version`` of a tensor that is no inference tensor, as a function that ``map`` calls without Python."""


class StandIn(NamedTuple):
    """What runs on float copies, and what it was made from.

    Attributes:
        layer: of torch's class, with plain float weights.
        buffers: all of the quantized layer, in turn.
        parameters: all of the quantized layer, in turn.
        counted: the buffers whose writes torch counts.
        versions: their counts.
    """

    layer: nn.Module
    buffers: tuple[Tensor | None, ...]
    parameters: tuple[Tensor | None, ...]
    counted: tuple[Tensor, ...]
    versions: list[int]

    @classmethod
    def of(cls, layer: nn.Module, quantized: nn.Module) -> StandIn:
        """For a layer that has the float weights of a quantized one, as that is now."""
        buffers = tuple(quantized._buffers.values())
        counted = tuple(each for each in buffers if each is not None and version_of(each) >= 0)
        versions: list[Any] = [*map(version_counter, counted)]
        return cls(layer, buffers, tuple(quantized._parameters.values()), counted, versions)


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
        stand_in: what runs on them, for whoever made it; None until somebody has.
    """

    stand_in: StandIn | None = None

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
        for key, tensor, version in self._sources:
            if buffers[key] is not tensor or (version >= 0 and tensor._version != version):
                return False
        return True
