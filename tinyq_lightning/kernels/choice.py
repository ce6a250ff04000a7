"""Which kernel a layer takes on this machine, and why: the one place where that is decided."""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tinyq_lightning.errors import SpecError
from tinyq_lightning.kernels.base import LONGEST_SUM, SUM_MAX, Implementation, WeightForm
from tinyq_lightning.kernels.float16 import (
    Float16Pairs,
    Float16Weights,
    has_float16_product,
)
from tinyq_lightning.kernels.float32 import Float32Codes, Float32Weights
from tinyq_lightning.kernels.int8 import (
    Int8Weights,
    OneDigitWeights,
    has_digit_product,
    has_int8_product,
)
from tinyq_lightning.methods import KERNELS, KernelName, Method

__all__ = [
    "FORMS",
    "Choice",
    "choose_kernel",
    "weight_form",
]

# Break-even: from so many products of a weight and an activation on, int8 is faster than the float copy. Measured on
# AMD Zen 5 with AVX512-VNNI, one thread, layers of 64x64 to 1536x384 alone, 1 to 1024 rows. Their weights stay in the
# cache; in a network that does not fit there int8 pays sooner, so where in doubt the number is the smaller one.
_INT8_PAYS_FROM = {"w8a32": 10_000_000, "w8a16": 3_000_000, "w8a8": 600_000}


# Layers of so many weights take it for any number of rows: reading a quarter of the bytes pays for itself.
_INT8_ALWAYS_FROM = 1_000_000


# Up to so many weights a float copy is the fastest. Measured on AVX2, as what follows.
_FLOAT16_PAYS_FROM = {"w8a32": 600_000, "w8a16": 512 * 512, "w8a8": 512 * 512}


# Up to so many rows float16 in two parts is faster than the formula. With more features the first part is too coarse.
_PAIRS_PAY_TO, _PAIRS_FEATURES = 16, SUM_MAX // (127 * 8)


@dataclass(frozen=True)
class Choice:
    """The kernel that a layer takes.

    Attributes:
        kernel: ``int8``, whole numbers summed exactly by the processor's int8 instructions, one byte a weight;
            ``int8x1``, the same for activations that one digit holds, by fewer operators; ``float16``, codes of
            two bytes each, multiplied in float32; ``float16x2``, the same beside the codes, with activations in
            two parts, as exact as ``nn.Linear``; ``float32``, a float copy of the weights beside the codes;
            ``float32x1``, the same for activations that are rounded to one digit; ``exact``, whole numbers summed
            exactly in float64; ``reference``, the formula.
        reason: in words.
        few_rows: below so many rows the layer takes the kernel ``few`` instead; 0 where it never does.
        few: that kernel.
    """

    kernel: Implementation
    reason: str
    few_rows: int = 0
    few: Implementation = "float32"

    @property
    def label(self) -> str:
        """The kernel, or the two of them: ``float32 to 18 rows, int8``."""
        if not self.few_rows:
            return self.kernel
        most = self.few_rows - 1
        return f"{self.few} to {most:,} row{'s' * (most > 1)}, {self.kernel}"


def choose_kernel(kernel: KernelName, method: Method, out_features: int, in_features: int) -> Choice:
    """Which kernel a float32, float16 or bfloat16 input takes on the CPU. Anything else takes the formula.

    The environment's ``TINYQ_KERNEL`` goes before what was asked for. It may be ``auto``, ``int8`` or
    ``reference``, and ``float16`` or ``float32`` to compare them.

    Args:
        kernel: what was asked for.
        method: of the layer.
        out_features: of the layer.
        in_features: of the layer.

    Raises:
        SpecError: ``TINYQ_KERNEL`` is something else.
    """
    wanted = _from_environment() or kernel
    if wanted == "reference" or not out_features * in_features:
        return Choice("reference", "as asked for" if wanted == "reference" else "no weights")
    if wanted == "float32":
        return Choice(_copy(method), "as asked for")
    if wanted == "float16":
        if not has_float16_product():
            return Choice("reference", "no float16 product here")
        return Choice("float16x2" if _takes_pairs(method, in_features) else "float16", "as asked for")
    if wanted == "int8":
        lacking = _lacking_int8(in_features)
        return Choice("exact", lacking) if lacking else Choice(_int8(method), "as asked for")
    return _fastest(method, out_features, in_features)


def _fastest(method: Method, out_features: int, in_features: int) -> Choice:
    weights = out_features * in_features
    lacking = _lacking_int8(in_features)
    if not lacking:
        if weights >= _INT8_ALWAYS_FROM:
            return Choice(_int8(method), "the processor has int8 products")
        rows = math.ceil(_INT8_PAYS_FROM[method.name] / weights)
        return Choice(_int8(method), "the processor has int8 products", rows, _copy(method))
    if has_float16_product():
        if weights <= _FLOAT16_PAYS_FROM[method.name]:
            small = "a float copy in memory, the fastest for layers this small; the file stays int8"
            return Choice(_copy(method), small)
        if method.rounds:
            return Choice("float16", lacking)
        if _takes_pairs(method, in_features):
            return Choice("reference", lacking, _PAIRS_PAY_TO + 1, "float16x2")
    return Choice("reference", lacking)


def _takes_pairs(method: Method, in_features: int) -> bool:
    return not method.rounds and in_features <= _PAIRS_FEATURES


def _copy(method: Method) -> Implementation:
    return "float32x1" if method.rounds else "float32"


def _int8(method: Method) -> Implementation:
    return "int8x1" if method.digits == 1 and has_digit_product() else "int8"


def _lacking_int8(in_features: int) -> str:
    if not has_int8_product():
        return "no fast and exact int8 product here"
    if in_features > LONGEST_SUM:
        return f"sums over {in_features:,} features can overflow int32"
    return ""


def _from_environment() -> str:
    asked = os.environ.get("TINYQ_KERNEL", "")
    allowed = (*KERNELS, "float16", "float32")
    if asked and asked not in allowed:
        raise SpecError(f"the environment variable TINYQ_KERNEL is {asked!r}: it must be one of {', '.join(allowed)}")
    return asked


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
