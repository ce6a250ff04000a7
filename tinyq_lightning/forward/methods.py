"""The methods: how finely each holds its activations."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["METHODS", "Method"]


@dataclass(frozen=True)
class Method:
    """How one method holds its activations.

    Attributes:
        name: as users write it.
        steps: largest whole number of the activations' fixed point.
        digits: how many int8 digits of base 256 hold such a number.
        float_activations: the formula takes the activations as they are.
    """

    name: str
    steps: int
    digits: int
    float_activations: bool = False

    @property
    def rounds(self) -> bool:
        """Whether kernels round the activations also where they multiply in floating point anyhow.

        So that what was measured with w8a8 on one processor holds on another. What w8a16 rounds away is far below
        what the weights lost, and no kernel has to. The float copy that a layer takes for few rows, where the
        processor has int8 products for more of them, rounds for no method: a layer is as fast as a float one there.
        """
        return self.digits == 1


METHODS = {
    method.name: method
    for method in (
        Method("w8a32", 127 * 256 * 256, digits=3, float_activations=True),
        Method("w8a16", 127 * 256, digits=2),
        Method("w8a8", 127, digits=1),
    )
}
