"""What a convolution adds to its input in a way of its own, before it is moved over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "OwnPadding",
]


@dataclass(frozen=True)
class OwnPadding:
    """The padding of a subclass of torch's convolutions, which torch's own arguments cannot tell.

    Attributes:
        ends: what is added at both ends of each dimension, the last first, as ``torch.nn.functional.pad`` takes it;
            None if it follows from the size of the input so that ``ceil(size / stride)`` places are left, with the odd
            one at the end, as TensorFlow's ``SAME`` has it.
        mode: of ``torch.nn.functional.pad``.
    """

    ends: tuple[int, ...] | None = None
    mode: str = "constant"

    def ends_for(self, layer: Any, sizes: Sequence[int]) -> list[int]:
        """What is added for an input of these sizes without batch and channels.

        Args:
            layer: a convolution, float or quantized.
            sizes: of the input; tensors while ``torch.jit`` traces, symbols in graphs.
        """
        if self.ends is not None:
            return list(self.ends)
        ends: list[int] = []
        for size, width, step, gap in zip(sizes, layer.kernel_size, layer.stride, layer.dilation, strict=True):
            places = (size + step - 1) // step
            more: Any = (places - 1) * step + (width - 1) * gap + 1 - size
            total = _positive(more)
            ends = [total // 2, total - total // 2, *ends]
        return ends


def _positive(more: Any) -> Any:
    """A size of torch's tracers, or zero if it is negative."""
    if isinstance(more, Tensor):
        return more.clamp(min=0)
    # torch 2.7 compiles the one alone, and torch.export takes the other alone for a size that it does not know
    return max(more, 0) if torch.compiler.is_dynamo_compiling() else torch.sym_max(more, 0)  # type: ignore[no-untyped-call]
