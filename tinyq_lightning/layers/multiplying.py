"""What linear layers and convolutions have in common: activations held by a method, a bias, and a chosen kernel."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tinyq_lightning.errors import ModelError
from tinyq_lightning.kernels import INPUT_DTYPES, Choice, FormulaName, in_transform, wanted_kernel
from tinyq_lightning.layers.int8_weight import Int8Weight

__all__ = [
    "MultiplyingLayer",
]


class MultiplyingLayer(Int8Weight):
    """A layer that multiplies activations by its codes, by a kernel that is chosen once for each type of device."""

    bias: nn.Parameter | None
    _choices: dict[str, Choice]

    @property
    def choice(self) -> Choice:
        """The kernel that the layer takes for inputs on the CPU, and why."""
        return self._choice_on("cpu")

    def _choice_on(self, device: str) -> Choice:
        choice = self._choices.get(device)
        if choice is None:
            choice = self._choices[device] = self._choose(device)
        return choice

    @abstractmethod
    def _choose(self, device: str) -> Choice:
        """The kernel for inputs on a type of device, and why."""

    def _formula_for(self, x: Tensor) -> FormulaName:
        """The formula for an input that is not multiplied by a form of the weights."""
        return "integer" if self._is_summed_on_gpu(x) else self._formula_name()

    def _is_summed_on_gpu(self, x: Tensor) -> bool:
        return x.is_cuda and x.dtype in INPUT_DTYPES and self._choice_on("cuda").kernel == "int8-cuda"

    def _formula_name(self) -> Literal["exact", "reference"]:
        return "exact" if wanted_kernel(self.kernel) == "int8" else "reference"

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _is_transformed(self) -> bool:  # run once, while a graph is traced
        return in_transform()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_choices": {}}

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "bias" and isinstance(value, Tensor):
            if value.shape != self.scales.shape:
                raise ModelError(f"a bias must have shape {list(self.scales.shape)}, got {list(value.shape)}")
            if not isinstance(value, nn.Parameter):
                value = nn.Parameter(value.detach(), requires_grad=False)
        super().__setattr__(name, value)
        if name == "bias":
            self._keep_a_parameter()
        if name == "kernel":
            self._choices = {}
