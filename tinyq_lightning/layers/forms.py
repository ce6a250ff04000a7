"""The forms that kernels have made of one layer's weights."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from tinyq_lightning.kernels import CodeHolder, TensorSnapshot, WeightForm
from tinyq_lightning.layers.dequantized import Dequantized

__all__ = [
    "Forms",
]


class Forms(dict[str, WeightForm]):
    """The forms that kernels have made of one layer's weights, by kernel.

    Attributes:
        dequantized: the float weight, while it is kept.
        own: the codes that are the layer's, if it last held plain ones.
        own_scales: the scales that are the layer's.
        keeps_codes: True once the layer was in a graph, which reads the plain codes: they stay beside the forms then.
    """

    keeps_codes = False
    own: TensorSnapshot | None = None
    own_scales: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.dequantized = Dequantized()

    def are_lent(self, codes: Tensor) -> bool:
        """Return True if these codes stand in for the layer's own for a while, as in torch.func.functional_call."""
        if (holder := self.holder()) is not None:
            return not holder.handed_out(codes)
        own = None if self.own is None else self.own.tensor()
        return own is not None and own is not codes

    def holder(self) -> CodeHolder | None:
        """The form that may be the only place of the codes."""
        return next((cast(CodeHolder, form) for form in self.values() if form.holds_codes), None)
