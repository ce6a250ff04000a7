"""What kernels have in common: what a kernel says of itself, and the form of the weights that it multiplies."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary
from typing_extensions import override

from tinyq_lightning.kernels.tracing import outside_modes
from tinyq_lightning.methods import METHODS, Method

__all__ = [
    "LONGEST_SUM",
    "STEPS",
    "SUM_MAX",
    "Choice",
    "CodeHolder",
    "Kernel",
    "LayerShape",
    "TensorSnapshot",
    "WeightForm",
    "plus_bias",
    "version_of",
    "with_memory",
]

LONGEST_SUM = (2**31 - 1) // (127 * 128)
"""The most features whose sum of products of digit and code, 128·127 at most each, cannot overflow int32."""


SUM_MAX = 2**24
"""Integers up to this are exact in float32."""


# Constants are 0-d tensors, so that torch need not convert a Python number on every call.
STEPS = {method.digits: torch.tensor(method.steps, dtype=torch.float32, device="cpu") for method in METHODS.values()}
"""The largest integer of the activations, by the number of digits that hold it."""


@dataclass(frozen=True)
class LayerShape:
    """What a kernel is asked about: the method and the size of a layer.

    Attributes:
        method: how the layer holds its activations.
        out_features: rows of its weight.
        in_features: columns of its weight.
        compact: whether the layer is to hold no more than its codes: one byte a weight, or half of one.
        device: the type of device that it is called on.
    """

    method: Method
    out_features: int
    in_features: int
    compact: bool = False
    device: str = "cpu"

    @property
    def weights(self) -> int:
        """How many weights the layer has."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Choice:
    """The kernel that a layer takes.

    Attributes:
        kernel: ``int8``, integers summed exactly by the processor's int8 instructions, on plain codes;
            ``int8-onednn`` and ``int8-fbgemm``, the same on codes packed by a library, instead of the plain ones;
            ``int8-split``, for activations of one digit where products saturate, in two parts;
            ``float16``, codes of two bytes each, multiplied in float32; ``float16x2``, the same beside the codes,
            with activations in two parts, as exact as ``nn.Linear``; ``float32``, a float copy of the weights
            beside the codes; ``float32x1``, the same for activations that are rounded; ``exact``, integers summed
            exactly in float64; ``int8-cuda``, integers summed exactly by a GPU's int8 products; ``fused``, codes
            expanded within a GPU's product of floats; ``int4``, codes of four bits that are expanded on each call;
            ``reference``, the formula. Of convolutions also ``int8-grouped``, as ``int8-onednn`` for several groups,
            beside the plain codes, ``int8-apart``, as ``int8-onednn`` for one group after the other, and ``windows``,
            by the kernel of a linear layer whose rows are the windows. Of look-ups ``int8-rows``, codes packed by a
            library with the scale of each row.
        reason: in words.
        few_rows: inputs of fewer rows take the kernel ``few`` instead; 0 if none do.
        few: that kernel.
        bytes_a_weight: what the layer holds in memory for each weight, once it has seen few rows and many.
        forms: of that, what each form takes that layers with the same codes share, by its name.
        keeps_codes: whether the plain codes are held as well.
    """

    kernel: str
    reason: str
    few_rows: int = 0
    few: str = "float32"
    bytes_a_weight: float = field(default=1, compare=False)
    forms: Mapping[str, float] = field(default_factory=dict, compare=False, repr=False)
    keeps_codes: bool = field(default=True, compare=False, repr=False)

    @property
    def label(self) -> str:
        """The kernel, or the two of them: ``float32 to 18 rows, int8``."""
        if not self.few_rows:
            return self.kernel
        most = self.few_rows - 1
        return f"{self.few} to {most:,} row{'s' * (most > 1)}, {self.kernel}"

    def bytes_beside(self, others: Sequence[Choice]) -> float:
        """What a layer holds for each weight, beside what other layers hold that have the same codes."""
        shared = {name for other in others for name in other.forms}
        alone = self.bytes_a_weight - self.keeps_codes - sum(self.forms.values())
        plain = self.keeps_codes and not any(other.keeps_codes for other in others)
        return alone + plain + sum(taken for name, taken in self.forms.items() if name not in shared)


def with_memory(choice: Choice, forms: Mapping[str, type[WeightForm]]) -> Choice:
    """The choice with what its forms take; the plain codes lie beside those that do not hold them."""
    names = {choice.kernel, choice.few} if choice.few_rows else {choice.kernel}
    taken = {name: forms[name] for name in names if name in forms}
    plain = not any(form.holds_codes for form in taken.values())
    by_name = {name: form.bytes_a_weight for name, form in taken.items()}
    return replace(choice, bytes_a_weight=sum(by_name.values()) + plain, forms=by_name, keeps_codes=plain)


class TensorSnapshot:
    """A tensor as it was at one moment. Does not keep it alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._ref = TensorWeakRef(tensor)
        self._version = version_of(tensor)

    def tensor(self) -> Tensor | None:
        """The tensor, or None if nothing refers to it any more."""
        return cast("Tensor | None", self._ref())

    def matches(self, tensor: Tensor) -> bool:
        """Return True if this is the tensor, and nothing has been written to it since."""
        return self._ref() is tensor and version_of(tensor) == self._version

    def was_written_to(self) -> bool:
        """Return True if the tensor is alive and has been written to since."""
        tensor = self._ref()
        return tensor is not None and version_of(tensor) != self._version


def version_of(tensor: Tensor) -> int:
    """A number that grows with each write to the tensor; -1 if torch does not count them."""
    return -1 if tensor.is_inference() else tensor._version


class WeightForm(ABC):
    """Weights ``q * s`` laid out for one kernel.

    Args:
        codes: ``q``, ``[out, in]`` int8.
        scales: ``s``, ``[out]`` float32.
    """

    holds_codes: ClassVar[bool]
    """True if the codes can be unpacked from the form, so that the layer need not keep them beside it."""

    bytes_a_weight: ClassVar[float]
    """What the form takes, without the codes beside it."""

    any_dtype: ClassVar[bool] = False
    """True if the product takes float16 and bfloat16 too, and gives what it is given."""

    @abstractmethod
    def __init__(self, codes: Tensor, scales: Tensor) -> None: ...

    @abstractmethod
    def is_current(self, codes: Tensor | None, scales: Tensor) -> bool:
        """Return True if codes and scales are unchanged since this form was made.

        ``codes=None`` stands for the codes that the form itself holds.
        """

    @abstractmethod
    def codes(self) -> Tensor:
        """The codes ``[out, in]`` int8."""

    @abstractmethod
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ (q * s)ᵀ + bias``: ``[rows, in]`` float32, contiguous → ``[rows, out]`` float32, new memory.

        The bias is ``[out]`` of any floating dtype.
        """


class BesideCodes(WeightForm):
    """A form that a layer holds beside its codes."""

    holds_codes = False

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self._codes, self._codes_version = codes, version_of(codes)
        self._scales, self._scales_version = scales, version_of(scales)

    @override
    def is_current(self, codes: Tensor | None, scales: Tensor) -> bool:
        # Written out instead of using TensorSnapshot: small layers ask this on each call, and a microsecond counts.
        return (
            (codes is None or codes is self._codes)
            and scales is self._scales
            and (self._codes_version < 0 or self._codes._version == self._codes_version)
            and (self._scales_version < 0 or scales._version == self._scales_version)
        )

    @override
    def codes(self) -> Tensor:
        return self._codes


class CodeHolder(WeightForm):
    """A form that the codes can be unpacked from; it returns the same tensor as before while that is alive.

    Forms for different kernels that are made from the same codes unpack one tensor, so that layers that share the
    codes still do.

    Attributes:
        shape: of the codes, ``[out, in]``.
    """

    holds_codes = True

    @abstractmethod
    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.shape = codes.shape
        self._source = _source_of(codes)

    @override
    def is_current(self, codes: Tensor | None, scales: Tensor) -> bool:
        plain = self._source.plain  # read once: another thread may set it to None
        if plain is None:
            return codes is None
        if codes is not None:
            return plain.matches(codes)
        if plain.tensor() is None:
            self._source.plain = None  # nobody can write to the plain codes any more, so the next call need not check
        return not plain.was_written_to()

    def handed_out(self, codes: Tensor) -> bool:
        """Return True if the form was made from this tensor or unpacked it, whatever was written to it since."""
        plain = self._source.plain
        return plain is not None and plain.tensor() is codes

    @override
    def codes(self) -> Tensor:
        with _unpacking:
            plain = self._source.plain
            codes = None if plain is None else plain.tensor()
            if codes is None:
                with outside_modes():
                    codes = self._unpacked()
                self._source.plain = TensorSnapshot(codes)
                _sources[codes] = self._source
            return codes

    @abstractmethod
    def _unpacked(self) -> Tensor: ...


@dataclass
class _Source:
    """The codes that forms were made from.

    Attributes:
        plain: the tensor that has them, as long as it is alive.
    """

    plain: TensorSnapshot | None


_sources: MutableMapping[Tensor, _Source] = WeakTensorKeyDictionary()


_unpacking = threading.RLock()


def _source_of(codes: Tensor) -> _Source:
    """The same for all forms of one tensor, until it is written to."""
    with _unpacking:
        known = _sources.get(codes)
        if known is None or known.plain is None or not known.plain.matches(codes):
            known = _sources[codes] = _Source(TensorSnapshot(codes))
        return known


class Kernel(ABC):
    """One way to multiply with int8 weights: where it runs, the forms of the weights it takes, and when it pays.

    To add a kernel, write one file with a subclass, its probe and its forms, and add an instance to the list in
    :mod:`~tinyq_lightning.kernels.choice`.
    """

    name: ClassVar[str]
    """As users ask for it, by ``TINYQ_KERNEL`` or by the spec's ``kernel``."""

    devices: ClassVar[frozenset[str] | None]
    """The types of device that it runs on; None for all."""

    forms: ClassVar[Mapping[str, type[WeightForm]]] = {}
    """The form of the weights for each of its variants; a variant that is not listed takes the plain codes."""

    instead: ClassVar[str] = "reference"
    """The variant that a layer takes if it asks for this kernel and the kernel cannot run it."""

    @abstractmethod
    def lacks(self, layer: LayerShape) -> str:
        """Why the kernel cannot run this layer on this machine; an empty string if it can."""

    @abstractmethod
    def variant(self, layer: LayerShape) -> str:
        """The variant of the kernel that runs this layer."""

    @abstractmethod
    def fastest(self, layer: LayerShape, lacking: str) -> Choice | None:
        """The choice for the layer if this kernel is the fastest for it, or for some of its inputs; else None.

        Asked only if the kernel can run the layer, and kernels before it in the list are not the fastest.

        Args:
            layer: its method and size.
            lacking: why the kernels before it in the list cannot run the layer.
        """


def plus_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    """Add ``bias`` to ``out`` in place; without a bias, return ``out`` as it is."""
    # Not fused with the multiplication before it: that may round once or twice, by a row's place in its batch.
    return out if bias is None else out.add_(bias)
