"""A layer's weights in the form that a kernel multiplies, and the product with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import MutableMapping
from typing import ClassVar, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary
from typing_extensions import override

from tinyq_lightning.forward.choice import SUM_MAX, Implementation
from tinyq_lightning.forward.fixed_point import STEPS, fixed_point_product, one_digit_product
from tinyq_lightning.forward.methods import Method
from tinyq_lightning.forward.processor import (
    float16_product,
    pack_digit,
    pack_float16,
    pack_int8,
    unpack_digit,
    unpack_float16,
    unpack_int8,
)
from tinyq_lightning.forward.reference import input_gradient
from tinyq_lightning.weight_math import CODE_MAX, activation_steps, dequantize, quantize_rows_to_steps

__all__ = ["FORMS", "CodeHolder", "Float32Weights", "Seen", "WeightForm", "weight_form"]


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


class Float32Weights(BesideCodes):
    """A float copy of the weights, for activations as they are.

    Attributes:
        weight: ``q * s``, ``[out, in]`` float32.
    """

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__(codes, scales)
        self.weight = dequantize(codes, scales)

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, self.weight, None if bias is None else bias.float())

    @override
    def gradient(self, grad: Tensor, scales: Tensor) -> Tensor:
        return grad @ self.weight


class Float32Codes(BesideCodes):
    """A float copy of the codes, for rounded activations.

    Sums of whole numbers below 2²⁴ are exact, so that w8a8 gives the same bits as by any other kernel.
    """

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__(codes, scales)
        self._whole = codes.float()

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        whole, step = quantize_rows_to_steps(x, STEPS[method.digits])
        return _plus(nn.functional.linear(whole, self._whole).mul_(scales).mul_(step), bias)

    @override
    def gradient(self, grad: Tensor, scales: Tensor) -> Tensor:
        return grad.mul(scales) @ self._whole


class Float16Pairs(BesideCodes):
    """The codes in two bytes each, for activations that are to lose nothing.

    The product sums in order, which loses two to four times what ``nn.linear`` does. So a row goes in two parts: whole
    numbers so small that all their sums stay below 2²⁴, which is exact, and the little rest.
    """

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__(codes, scales)
        self._packed = pack_float16(codes)
        steps = min(CODE_MAX, SUM_MAX // (CODE_MAX * codes.shape[1]))
        self._steps = torch.tensor(steps, dtype=torch.float32, device="cpu")

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        rows, columns = x.shape
        parts = x.new_empty(2, rows, columns)
        step = activation_steps(x, self._steps)
        whole = torch.div(x, step, out=parts[0]).round_()
        torch.addcmul(x, whole, step, value=-1, out=parts[1])
        out, rest = float16_product(parts.view(2 * rows, columns), self._packed).view(2, rows, -1).unbind()
        return _plus(rest.addcmul_(out, step).mul(scales), bias)  # not a part of something larger

    @override
    def gradient(self, grad: Tensor, scales: Tensor) -> Tensor:
        return input_gradient(grad, self._codes, scales)


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


class Float16Weights(CodeHolder):
    """The codes in two bytes each, for activations in float32."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__(codes, scales)
        self._packed = pack_float16(codes)

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        if not method.rounds:
            return _plus(float16_product(x, self._packed).mul_(scales), bias)
        whole, step = quantize_rows_to_steps(x, STEPS[method.digits])
        return _plus(float16_product(whole, self._packed).mul_(scales).mul_(step), bias)

    @override
    def _unpacked(self) -> Tensor:
        return unpack_float16(self._packed)


class OneDigitWeights(CodeHolder):
    """The codes in one byte each and their scales, for exact products of whole numbers of one int8 digit."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__(codes, scales)
        self._packed = pack_digit(codes, scales)
        self._scales = Seen(scales)

    @override
    def is_of(self, codes: Tensor | None, scales: Tensor) -> bool:
        return self._scales.is_still(scales) and super().is_of(codes, scales)

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        return _plus(one_digit_product(x, self._packed), bias)

    @override
    def _unpacked(self) -> Tensor:
        return unpack_digit(self._packed)


class Int8Weights(CodeHolder):
    """The codes in one byte each, for exact products of whole numbers."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__(codes, scales)
        self._packed = pack_int8(codes)
        self._zero_points = codes.new_zeros(len(codes), dtype=torch.int32)

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        return _plus(fixed_point_product(method, x, self._packed, scales, self._zero_points), bias)

    @override
    def _unpacked(self) -> Tensor:
        return unpack_int8(self._packed)


def _plus(out: Tensor, bias: Tensor | None) -> Tensor:
    # Not fused with the multiplication before it: that may round once or twice, by a row's place in its batch.
    return out if bias is None else out.add_(bias)


FORMS: dict[Implementation, type[WeightForm]] = {
    "float32": Float32Weights,
    "float32x1": Float32Codes,
    "float16": Float16Weights,
    "float16x2": Float16Pairs,
    "int8": Int8Weights,
    "int8x1": OneDigitWeights,
}
"""The form of the weights that each kernel takes; the others take the codes as they are."""

# Layers that share codes share what is made of them.
_made: MutableMapping[Tensor, WeakValueDictionary[str, WeightForm]] = WeakTensorKeyDictionary()


def weight_form(kernel: Implementation, codes: Tensor, scales: Tensor) -> WeightForm:
    """The form that ``kernel`` takes, made from codes ``[out, in]`` int8 and scales ``[out]`` float32 on the CPU."""
    known = _made.setdefault(codes, WeakValueDictionary())
    form = known.get(kernel)
    if form is None or not form.is_of(codes, scales):
        with torch.inference_mode(False), torch.no_grad():  # can be trained past later
            form = known[kernel] = FORMS[kernel](codes, scales)
    return form
