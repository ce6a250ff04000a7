"""What the plan, the budget, timings and reports ask of a quantized layer, of whatever kind it is."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from typing_extensions import Self

from tinyq_lightning.errors import SpecError
from tinyq_lightning.kernels import Choice
from tinyq_lightning.methods import KERNELS, METHODS, KernelName

if TYPE_CHECKING:
    from tinyq_lightning.layers.int8_weight import Int8Weight

__all__ = [
    "PLACEHOLDER",
    "QuantizedLayer",
]

PLACEHOLDER = "no_values"
"""The parameter of no elements that a layer without another has, and no state dict."""


class QuantizedLayer(nn.Module):
    """A module that holds one weight or several as int8 codes. Nothing below it is a layer of a model's plan.

    Attributes:
        method: how it holds its activations; ``w8a32`` takes them as they are.
        kernel: what its spec asked for; anything but a name of a kernel is refused with a SpecError.
        dtype: floating dtype of the dequantized weights.
    """

    method: str = "w8a32"
    kernel: KernelName = "auto"
    dtype: torch.dtype

    @property
    def choice(self) -> Choice | None:
        """The kernel that the layer takes for inputs on the CPU, and why; None if there is no choice."""
        return None

    @property
    def bits(self) -> int:
        """Of a weight's code: 8 or 4."""
        return METHODS[self.method].bits

    @property
    def device(self) -> torch.device:
        """Where its codes are."""
        return next(iter(self.coded_weights().values())).scales.device

    def coded_weights(self) -> Mapping[str, Int8Weight]:
        """What holds the codes of each weight, by the name that the weight has in the float layer."""
        raise NotImplementedError

    def code_places(self) -> Mapping[str, tuple[nn.Module, str]]:
        """The module and the buffer that hold the codes of each weight, by the name of the weight."""
        return {name: (holder, "int8_weights") for name, holder in self.coded_weights().items()}

    def with_method(self, method: str) -> QuantizedLayer:
        """A layer that holds its activations by another of its kind's methods and shares this layer's tensors."""
        if method != self.method:
            raise NotImplementedError(f"{type(self).__name__} has no method {method}")
        return self

    def _refuse_other_bits(self, method: str) -> None:
        if METHODS[method].bits != METHODS[self.method].bits:
            raise NotImplementedError(f"the codes of a {self.method} layer are none of {method}: quantize it anew")

    def share(self, other: QuantizedLayer) -> Self:
        """Take the codes and scales of ``other``: the same memory, not a copy. Returns the layer."""
        for own, theirs in zip(self.coded_weights().values(), other.coded_weights().values(), strict=True):
            own.share(theirs)
        return self

    def _keep_a_parameter(self) -> None:
        """Hold a parameter of no elements if there is no other."""
        self._parameters.pop(PLACEHOLDER, None)
        if all(parameter is None for parameter in self._parameters.values()):
            with torch.inference_mode(False):
                values = torch.empty(0, dtype=self.dtype, device=self.device)
                self._parameters[PLACEHOLDER] = nn.Parameter(values, requires_grad=False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As of any module. Who asks for this very layer is told what stays."""
        if requires_grad:
            warnings.warn(
                f"TinyQ: the weights of {type(self).__name__} are codes, which cannot be trained; only biases can. "
                "Leave the layer float to train it: name it under exclude",
                stacklevel=2,
            )
        return super().requires_grad_(requires_grad)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "kernel" and value not in KERNELS:
            raise SpecError(f"kernel {value!r}: it must be one of {', '.join(KERNELS)}")
        super().__setattr__(name, value)
