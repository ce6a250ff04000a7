"""Which kernel a layer takes on this machine, and why: the one place where that is decided."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal

from tinyq_lightning.errors import SpecError
from tinyq_lightning.forward.methods import Method
from tinyq_lightning.forward.processor import has_float16_product, has_int8_product

__all__ = ["KERNELS", "LONGEST_SUM", "Choice", "Implementation", "KernelName", "choose_kernel"]

KernelName = Literal["auto", "int8", "reference"]
KERNELS: tuple[KernelName, ...] = ("auto", "int8", "reference")

Implementation = Literal["int8", "float16", "float32", "exact", "reference"]

LONGEST_SUM = (2**31 - 1) // (127 * 128)
"""Features whose products of digit and code, 128·127 at most each, are sure to fit an int32 sum."""

# What is done around an int8 product costs as much as float32 needs for so many products of a weight and an
# activation, beyond what the product saves. From the prototypes of this kernel on AVX512-VNNI.
_INT8_PAYS_FROM = {"w8a32": 11_000_000, "w8a16": 2_800_000, "w8a8": 1_300_000}
# Layers of more weights take it for any number of rows: reading a quarter of the bytes pays for itself.
_INT8_ALWAYS_FROM = 1_200_000
# Up to so many weights float16 is no faster than float32. Measured on AVX2.
_FLOAT16_PAYS_FROM = 512 * 512


@dataclass(frozen=True)
class Choice:
    """The kernel that a layer takes.

    Attributes:
        kernel: ``int8``, whole numbers summed exactly by the processor's int8 instructions, one byte a weight;
            ``float16``, codes of two bytes each, multiplied in float32; ``float32``, a float copy of the
            weights beside the codes; ``exact``, whole numbers summed exactly in float64; ``reference``, the formula.
        reason: in words.
        few_rows: below so many rows an ``int8`` layer takes a float copy too; 0 where it never does.
    """

    kernel: Implementation
    reason: str
    few_rows: int = 0

    @property
    def label(self) -> str:
        """The kernel, and from how many rows."""
        return f"{self.kernel} from {self.few_rows:,} rows" if self.few_rows else self.kernel


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
        return Choice("float32", "as asked for")
    if wanted == "float16":
        able = has_float16_product()
        return Choice("float16", "as asked for") if able else Choice("reference", "no float16 product here")
    if wanted == "int8":
        return Choice("exact", lacking) if (lacking := _lacking_int8(in_features)) else Choice("int8", "as asked for")
    return _fastest(method, out_features, in_features)


def _fastest(method: Method, out_features: int, in_features: int) -> Choice:
    weights = out_features * in_features
    lacking = _lacking_int8(in_features)
    if not lacking:
        if weights >= _INT8_ALWAYS_FROM:
            return Choice("int8", "the processor has int8 products")
        rows = math.ceil(_INT8_PAYS_FROM[method.name] / weights)
        return Choice("int8", "the processor has int8 products", rows)
    if has_float16_product():
        small = weights <= _FLOAT16_PAYS_FROM
        return (
            Choice("float32", "a float copy in memory, which is faster for layers this small; the file stays int8")
            if small
            else Choice("float16", lacking)
        )
    return Choice("reference", lacking)


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
