"""The forms that kernels have made of one layer's weights."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from tinyq_lightning.kernels import CodeHolder, TensorSnapshot, WeightForm
from tinyq_lightning.layers.dequantized import Dequantized

__all__ = [
    "Forms",
    "OwnTensors",
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


class OwnTensors:
    """What tensors are the layer's, whatever stands in its buffers for a while, as in torch.func.functional_call.

    Not among the forms, for graphs that look at them would be guarded by how many forms there are.

    Attributes:
        codes: the layer's, if it last held plain ones.
        codes_in_graphs: the same, where graphs read them and they stay for that.
        scales: the layer's.
    """

    codes: TensorSnapshot | None = None
    codes_in_graphs: Tensor | None = None
    scales: Tensor | None = None

    def take_codes(self, codes: Tensor | None) -> None:
        """Take these codes for the layer's own, or none for now."""
        self.codes, self.codes_in_graphs = None if codes is None else TensorSnapshot(codes), None

    def show_graphs(self) -> None:
        """Let graphs compare with the codes, which stay from now on."""
        self.codes_in_graphs = None if self.codes is None else self.codes.tensor()

    def are_lent(self, codes: Tensor, holder: CodeHolder | None) -> bool:
        """Return True if these codes stand in for the layer's own, which a form may hold instead."""
        if holder is not None:
            return not holder.handed_out(codes)
        own = None if self.codes is None else self.codes.tensor()
        return own is not None and own is not codes
