"""What a kind of layer has to say of itself, so that it can be found, planned, quantized, loaded and restored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tinyq_lightning.layers.int8_weight import Int8Weight
from tinyq_lightning.methods import KernelName

__all__ = [
    "Candidate",
    "Kind",
]


@dataclass(frozen=True)
class Candidate:
    """A float layer that a kind has found.

    Attributes:
        kind: the kind that makes, counts and restores it.
        layer: the module itself, or one that stands for it, with a matrix ``[out, in]`` over the same memory as its
            ``weight`` and the same ``bias``.
        parameter: where its weight is: a module, and the parameter's name there.
        why_float: why it cannot be quantized without a change of meaning; None if it can.
        part: for a layer inside the module, the attribute of ``opened`` that holds it.
        opened: what takes the module's place if any part of it is quantized, and holds the parts as modules.
    """

    kind: Kind
    layer: nn.Module
    parameter: tuple[nn.Module, str]
    why_float: str | None
    part: str = ""
    opened: nn.Module | None = None


class Kind(ABC):
    """One kind of layer. A new kind is a subclass in a file of its own, and an entry in ``kinds.KINDS``.

    Attributes:
        name: as plans and errors call it.
        takes_methods: whether its quantized layer is a ``QuantizedLinear``, which holds activations by a method and
            takes kernels, so that the budget can give it another method and ``never_slower`` can time it.
        only_tied: whether a layer of the kind is planned only if it shares its weight with one that takes methods.
        is_layer: whether a model that is itself of this kind could be replaced, which takes a parent.
    """

    name: ClassVar[str]
    takes_methods: ClassVar[bool] = True
    only_tied: ClassVar[bool] = False
    is_layer: ClassVar[bool] = True
    quantized_class: ClassVar[type[Int8Weight]]

    @abstractmethod
    def finds(self, module: nn.Module) -> bool:
        """Whether ``module`` is a float layer of this kind, or holds such layers as bare matrices."""

    @abstractmethod
    def candidates(self, module: nn.Module, closed: str | None) -> Iterator[Candidate]:
        """The layers of a module that :meth:`finds` has found.

        Args:
            module: the module.
            closed: why its parent cannot have it replaced, or None.
        """

    @abstractmethod
    def shape(self, layer: nn.Module) -> tuple[int, int]:
        """Rows and columns of the weight of a float or a quantized layer, by the sizes it tells."""

    @abstractmethod
    def make(self, layer: Any, codes: Int8Weight | None, method: str, kernel: KernelName) -> Int8Weight:
        """The quantized layer for a float one.

        Args:
            layer: the float layer, as a :class:`Candidate` has it.
            codes: codes of its weight; None to make them.
            method: what the plan gives it.
            kernel: what the spec asks for.
        """

    @abstractmethod
    def make_empty(self, layer: Any, method: str, kernel: KernelName) -> Int8Weight:
        """A quantized layer of the sizes of a float one, for ``load_state_dict`` to fill."""

    def restore(self, layer: nn.Module, owner: nn.Module, quantized: Int8Weight) -> None:
        """Give a float layer the dequantized weight, and the bias, of the quantized layer that stood for it.

        Args:
            layer: the float layer, as a :class:`Candidate` has it.
            owner: the module that registers its weight.
            quantized: the quantized layer.
        """
        layer.to(quantized.scales.device, quantized.dtype)
        with torch.no_grad():
            if parametrize.is_parametrized(layer, "weight"):
                with suppress(NotImplementedError):  # a parametrization that has no inverse
                    layer.weight = quantized.dequantize().to(quantized.dtype)
            else:
                cast(Tensor, layer.weight).data.copy_(quantized.dequantize())
            if isinstance(bias := getattr(layer, "bias", None), nn.Parameter):
                bias.data.copy_(cast(Tensor, quantized.bias))

    def is_quantized(self, module: object) -> bool:
        """Whether ``module`` is a quantized layer of this kind."""
        return isinstance(module, self.quantized_class)
