"""What kernels have in common: the form of the weights that a kernel multiplies, and when it must be made again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef
from typing_extensions import override

from tinyq_lightning.kernels.formula import input_gradient
from tinyq_lightning.methods import METHODS, Method

__all__ = [
    "LONGEST_SUM",
    "STEPS",
    "SUM_MAX",
    "CodeHolder",
    "Implementation",
    "Seen",
    "WeightForm",
    "plus_bias",
]

Implementation = Literal["int8", "int8x1", "float16", "float16x2", "float32", "float32x1", "exact", "reference"]


LONGEST_SUM = (2**31 - 1) // (127 * 128)
"""Features whose products of digit and code, 128·127 at most each, are sure to fit an int32 sum."""


SUM_MAX = 2**24
"""The whole numbers up to this are exact in float32."""


# Numbers are in tensors: torch would make one of each on each call.
STEPS = {method.digits: torch.tensor(method.steps, dtype=torch.float32, device="cpu") for method in METHODS.values()}
"""The largest whole number of the activations, by how many digits hold it."""


class Seen:
    """A tensor as it was at one moment. Does not keep it alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._ref = TensorWeakRef(tensor)
        self._version = _version(tensor)

    def tensor(self) -> Tensor | None:
        """The tensor, while anybody has it."""
        return cast("Tensor | None", self._ref())

    def is_still(self, tensor: Tensor) -> bool:
        """Whether this is the tensor, and nothing has been written to it since."""
        return self._ref() is tensor and _version(tensor) == self._version

    def was_written(self) -> bool:
        """Whether something has been written to it since, as far as anybody can see."""
        tensor = self._ref()
        return tensor is not None and _version(tensor) != self._version


def _version(tensor: Tensor) -> int:
    """Grows with each write to the tensor; -1 where torch does not count them."""
    return -1 if tensor.is_inference() else tensor._version


class WeightForm(ABC):
    """Weights ``q * s`` laid out for one kernel, on the CPU.

    Args:
        codes: ``q``, ``[out, in]`` int8.
        scales: ``s``, ``[out]`` float32.
    """

    holds_codes: ClassVar[bool]
    """Whether the codes can be had back, so that they need not be kept beside."""

    @abstractmethod
    def __init__(self, codes: Tensor, scales: Tensor) -> None: ...

    @abstractmethod
    def is_of(self, codes: Tensor | None, scales: Tensor) -> bool:
        """Whether it was made from these, as they are now. No codes stand for those that a form holds itself."""

    @abstractmethod
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ (q * s)ᵀ + bias``: ``[rows, in]`` float32, contiguous → ``[rows, out]`` float32, new memory.

        The bias is ``[out]`` of any floating dtype.
        """

    @abstractmethod
    def gradient(self, grad: Tensor, scales: Tensor) -> Tensor:
        """``grad @ (q * s)``, the gradient of ``x``: ``[..., out]`` float32 → ``[..., in]`` float32."""


class BesideCodes(WeightForm):
    """A form that is held beside the codes."""

    holds_codes = False

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self._codes, self._codes_version = codes, _version(codes)
        self._scales, self._scales_version = scales, _version(scales)

    @override
    def is_of(self, codes: Tensor | None, scales: Tensor) -> bool:
        # Asked on each call of layers so small that a microsecond counts.
        return (
            (codes is None or codes is self._codes)
            and scales is self._scales
            and (self._codes_version < 0 or self._codes._version == self._codes_version)
            and (self._scales_version < 0 or scales._version == self._scales_version)
        )


class CodeHolder(WeightForm):
    """A form that holds the codes and gives them back: the very tensor, while anybody still has it."""

    holds_codes = True

    @abstractmethod
    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self._given: Seen | None = Seen(codes)

    @override
    def is_of(self, codes: Tensor | None, scales: Tensor) -> bool:
        given = self._given  # another thread may forget it
        if given is None:
            return codes is None
        if codes is not None:
            return given.is_still(codes)
        if given.tensor() is None:
            self._given = None  # nobody can write to them any more, and the next call need not ask
        return not given.was_written()

    def gave(self, codes: Tensor) -> bool:
        """Whether these are the codes that it was made from or has given back, whatever was written to them since."""
        given = self._given
        return given is not None and given.tensor() is codes

    def codes(self) -> Tensor:
        """The codes ``[out, in]`` int8."""
        given = self._given
        codes = None if given is None else given.tensor()
        if codes is None:
            with torch.inference_mode(False), torch.no_grad():
                codes = self._unpacked()
            self._given = Seen(codes)
        return codes

    @abstractmethod
    def _unpacked(self) -> Tensor: ...

    @override
    def gradient(self, grad: Tensor, scales: Tensor) -> Tensor:
        return input_gradient(grad, self.codes(), scales)


def plus_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    """``out + bias`` in place; ``out`` as it is where there is no bias."""
    # Not fused with the multiplication before it: that may round once or twice, by a row's place in its batch.
    return out if bias is None else out.add_(bias)
