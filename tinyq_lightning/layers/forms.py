"""The forms that kernels have made of one layer's weights."""

from __future__ import annotations

from typing import cast

from tinyq_lightning.kernels import CodeHolder, WeightForm
from tinyq_lightning.layers.dequantized import Dequantized

__all__ = [
    "Forms",
]


class Forms(dict[str, WeightForm]):
    """The forms that kernels have made of one layer's weights, by kernel.

    Attributes:
        dequantized: the float weight, while it is kept.
        keeps_codes: True once the layer was in a graph, which reads the plain codes: they stay beside the forms then.
    """

    keeps_codes = False

    def __init__(self) -> None:
        super().__init__()
        self.dequantized = Dequantized()

    def holder(self) -> CodeHolder | None:
        """The form that may be the only place of the codes."""
        return next((cast(CodeHolder, form) for form in self.values() if form.holds_codes), None)
