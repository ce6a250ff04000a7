"""Float copies of weights that are held as codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from tinyq_lightning.kernels import dequantize, outside_modes, version_of

__all__ = [
    "FloatCopies",
    "Ready",
    "version_counter",
]

version_counter = torch._C.TensorBase._version.__get__  # type: ignore[attr-defined]
"""``tensor._version`` of a tensor that is no inference tensor, as a function that ``map`` calls without Python."""


class Ready(NamedTuple):
    """A forward that runs on float copies, and the tensors that must be as they were for it to be called again.

    Attributes:
        forward: of torch's class, bound to a layer that has plain float weights.
        buffers: the first of the quantized layer, those that the weights come from among them.
        parameters: all of the quantized layer.
        counted: of the buffers that the weights come from, those whose writes torch counts.
        versions: their counts.
    """

    forward: Callable[..., Any]
    buffers: tuple[Tensor | None, ...]
    parameters: tuple[Tensor | None, ...]
    counted: tuple[Tensor, ...]
    versions: list[int]


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
        ready: its forward, if it may be called without a further look; None if not.
    """

    layer: nn.Module | None = None
    ready: Ready | None = None

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

    def ready_for(self, forward: Callable[..., Any], quantized: nn.Module) -> Ready:
        """What tells a quantized layer on its next calls that it can call ``forward`` at once."""
        keys = {key for key, _, _ in self._sources}
        buffers = list(quantized._buffers.items())
        while buffers[-1][0] not in keys:  # those of others, which may be written to on each call
            buffers.pop()
        counted = tuple(tensor for _, tensor, version in self._sources if version >= 0)
        versions = [version for _, _, version in self._sources if version >= 0]
        return Ready(forward, tuple(each for _, each in buffers), (*quantized._parameters.values(),), counted, versions)
