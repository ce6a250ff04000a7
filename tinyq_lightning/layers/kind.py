"""What a kind of layer has to say of itself: how it is found, planned, quantized, loaded, restored and timed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tinyq_lightning.kernels import Choice, dequantize, four_bit_bytes
from tinyq_lightning.layers.computed import float_weight, sources_of, take_weight
from tinyq_lightning.layers.int8_weight import Int8Weight
from tinyq_lightning.layers.quantized_layer import QuantizedLayer
from tinyq_lightning.methods import METHODS, KernelName, with_bits

__all__ = [
    "Candidate",
    "Kind",
    "WeightSize",
]

_SCALE_BYTES = 4  # one float32 a row


@dataclass(frozen=True)
class WeightSize:
    """The sizes of a weight, and which of its values share a scale.

    Attributes:
        shape: of the float weight, and of its codes.
        rows: the number of scales. The values of a row lie one after the other, unless :attr:`dim` is 1.
        dim: 0; or 1 if rows are counted along that dimension within each of ``rows / shape[1]`` equal groups of the
            first, as the output channels of a transposed convolution are.
    """

    shape: tuple[int, ...]
    rows: int
    dim: int = 0

    @property
    def count(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """The number of values that share a scale."""
        return self.count // max(self.rows, 1)

    def bytes(self, bits: int) -> int:
        """Of codes of so many bits and of scales; of four bits with the multipliers."""
        codes = self.count if bits == 8 else four_bit_bytes(self.rows, self.columns)
        return codes + _SCALE_BYTES * self.rows

    def to_rows(self, weight: Tensor) -> Tensor:
        """A weight or codes of :attr:`shape` → ``[rows, columns]``, one row for each scale."""
        if self.dim == 0:
            return weight.reshape(self.rows, -1)
        groups = self.rows // self.shape[1]
        return weight.reshape(groups, -1, *self.shape[1:]).transpose(1, 2).reshape(self.rows, -1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """``[rows, columns]`` → :attr:`shape`; the inverse of :meth:`to_rows`."""
        if self.dim == 0:
            return rows.view(self.shape)
        groups = self.rows // self.shape[1]
        return rows.view(groups, self.shape[1], -1, *self.shape[2:]).transpose(1, 2).reshape(self.shape).contiguous()


@dataclass(frozen=True)
class Candidate:
    """A float layer that a kind has found.

    Attributes:
        kind: the kind that makes, counts and restores it.
        layer: the module itself, or one that stands for it, with its weights over the same memory.
        weights: by the name of each weight in ``layer``, where it is: a module, and the parameter's name there.
        why_float: why it cannot be quantized without a change of meaning; None if it can.
        part: for a layer inside the module, the attribute of ``opened`` that holds it.
        opened: what takes the module's place if any part of it is quantized, and holds the parts as modules.
    """

    kind: Kind
    layer: nn.Module
    weights: Mapping[str, tuple[nn.Module, str]]
    why_float: str | None
    part: str = ""
    opened: nn.Module | None = None


class Kind(ABC):
    """One kind of layer. A new kind is a subclass in a file of its own, and an entry in ``kinds.KINDS``.

    Attributes:
        name: as specs, plans and errors call it; one of ``methods.KIND_NAMES``.
        methods: those that its quantized layers have. Another that is asked for becomes ``w4a32``, if it has four bits
            and the kind has them, or else ``w8a32``.
        why_w8a32: why it becomes that, for the plan.
        is_called: whether its quantized layers are called, so that there are inputs, outputs and times of them.
        why_uncalibrated: why its codes are not chosen with data; None if they are, by :meth:`weight_inputs`.
        quantized_class: of its quantized layers.
        left_behind: attributes of a float layer that its quantized layer is not given.
    """

    name: ClassVar[str]
    methods: ClassVar[tuple[str, ...]] = tuple(METHODS)
    why_w8a32: ClassVar[str] = "its activations stay as they are"
    is_called: ClassVar[bool] = True
    why_uncalibrated: ClassVar[str | None] = "its outputs are not the products of its inputs and a weight"
    quantized_class: ClassVar[type[QuantizedLayer]]
    left_behind: ClassVar[frozenset[str]] = frozenset()

    # Finding and planning

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
    def sizes(self, layer: Any) -> Mapping[str, WeightSize]:
        """The size of each weight of a float or a quantized layer by its name, by what the layer tells of itself."""

    def size_with(self, size: WeightSize, rows: int) -> WeightSize:
        """The size of a weight of which a file has so many rows: ``size``, unless earlier files have other rows."""
        return size

    def methods_of(self, layer: Any) -> tuple[str, ...]:
        """The methods that the quantized layer of ``layer``, float or quantized, can have."""
        return self.methods

    def method_for(self, layer: Any, wanted: str) -> tuple[str, str | None]:
        """The method of a float layer for which ``wanted`` is asked, and why it is another; None if it is the same."""
        if wanted in self.methods_of(layer):
            return wanted, None
        plain = with_bits("w8a32", METHODS[wanted].bits)
        if plain in self.methods_of(layer):
            return plain, self.why_w8a32
        return "w8a32", "its codes have eight bits" if wanted == plain else self.why_w8a32

    def choice(self, layer: Any, method: str, kernel: KernelName) -> Choice | None:
        """The kernel that the quantized layer of a float one would take on this CPU; None if there is no choice."""
        return None

    # Making, loading, restoring

    @abstractmethod
    def make(self, layer: Any, codes: Mapping[str, Int8Weight], method: str, kernel: KernelName) -> QuantizedLayer:
        """The quantized layer for a float one.

        Args:
            layer: the float layer, as a :class:`Candidate` has it.
            codes: codes and scales of each of its weights, to share.
            method: what the plan gives it.
            kernel: what the spec asks for.
        """

    @abstractmethod
    def make_empty(self, layer: Any, method: str, kernel: KernelName) -> QuantizedLayer:
        """A quantized layer of the sizes of a float one, for ``load_state_dict`` to fill."""

    def restore(self, layer: nn.Module, original: nn.Module, quantized: QuantizedLayer) -> bool:
        """Give a float layer the dequantized weights, and the biases, of the quantized layer that stood for it.

        Returns:
            False if it keeps a weight that it had, because it computes it and not back.

        Args:
            layer: the float layer, as a :class:`Candidate` has it.
            original: the module that the model holds for it.
            quantized: the quantized layer.
        """
        layer.to(quantized.device, quantized.dtype)
        weights, sizes, taken = quantized.coded_weights(), self.sizes(quantized), True
        with torch.no_grad():
            for name, codes in weights.items():
                rows = sizes[name].to_rows(codes.int8_weights)
                values = sizes[name].from_rows(dequantize(rows, codes.scales, quantized.dtype))
                if sources_of(layer, name):
                    taken &= take_weight(layer, values, name)
                elif parametrize.is_parametrized(layer, name):
                    try:
                        setattr(layer, name, values)
                    except NotImplementedError:  # a parametrization that has no inverse
                        taken = False
                else:
                    cast(Tensor, getattr(layer, name)).data.copy_(values)
            for name, kept in quantized._parameters.items():
                own = getattr(layer, name, None)
                if kept is not None and name not in weights and isinstance(own, nn.Parameter):
                    own.data.copy_(kept)
        return taken

    def is_quantized(self, module: object) -> bool:
        """Whether ``module`` is a quantized layer of this kind."""
        return isinstance(module, self.quantized_class)

    # Timing and measuring

    def size_of_call(self, layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
        """What the time of a call depends on: how much is computed, and the sizes of the inputs.

        Calls with the same sizes, or whose amounts lie within the same power of two, are timed once.

        Args:
            layer: float or quantized.
            args: of the call.
            kwargs: of the call.

        Returns:
            amount: in proportion to the time; 0 for a call not to be timed.
            sizes: what :meth:`example` makes such inputs from; empty if the amount tells all.

        Raises:
            TypeError: the layer was called with something else than it takes.
        """
        x = first_tensor(args, kwargs)
        return x.numel(), tuple(x.shape)

    def example(
        self, layer: Any, amount: int, sizes: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
    ) -> tuple[Any, ...]:
        """Random arguments for a call of a quantized ``layer``, as :meth:`size_of_call` describes it; on the CPU."""
        return (torch.randn(sizes, generator=generator).to(dtype),)

    def plain(self, layer: nn.Module) -> nn.Module:
        """A float layer to time: it computes its weights once, if a parametrization computes them on each call."""
        return layer

    def tokens(self, layer: Any, x: Tensor) -> Tensor | None:
        """An input as ``[tokens, values]``: a row for each scale that rounded activations have; None for indices."""
        return x.reshape(-1, x.shape[-1] if x.dim() else 1) if x.is_floating_point() else None

    def features(self, layer: Any, output: Tensor) -> Tensor:
        """An output as ``[places, features]``."""
        return output.reshape(-1, output.shape[-1] if output.dim() else 1)

    def row_parts(self, layer: Any) -> int:
        """In how many equal parts the rows of the weight are, each multiplied with inputs of its own."""
        return 1

    def row_inputs(self, layer: Any, x: Tensor) -> Iterator[Tensor]:
        """What the rows of the weight are multiplied with, block by block: ``[parts, n, columns]`` each.

        Args:
            layer: float or quantized.
            x: the input of a call.
        """
        yield x.reshape(1, -1, x.shape[-1])

    def weight_inputs(
        self, layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Iterator[tuple[str, Tensor]]:
        """The name of a weight and what its rows are multiplied with in a call, as :meth:`row_inputs` yields it.

        Args:
            layer: float, as it was called.
            args: of the call.
            kwargs: of the call.
        """
        x = first_tensor(args, kwargs)
        x = torch.cat(x.unbind()) if x.is_nested else x
        for inputs in self.row_inputs(layer, x.detach()) if x.numel() else ():
            yield "weight", inputs

    def float_weights(self, layer: nn.Module) -> dict[str, Tensor]:
        """The weights that a float layer uses, by their names."""
        return {name: float_weight(layer, name) for name in self.sizes(layer)}


def first_tensor(args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a layer's call, positional or by keyword; of a packed sequence, its values.

    Raises:
        TypeError: it is not a tensor, or there is none.
    """
    given = args[0] if args else next(iter(kwargs.values()), None)
    if isinstance(given, nn.utils.rnn.PackedSequence):
        given = given.data
    if not isinstance(given, Tensor):
        raise TypeError(f"the layer was called with a {type(given).__name__}, not a tensor")
    return given
