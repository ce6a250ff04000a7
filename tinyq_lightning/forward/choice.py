"""Which kernel a layer takes on this machine, and why: the one place where that is decided."""

from __future__ import annotations

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

# Up to so many weights, what is done around a product costs more than a product of int8 or float16 saves. See
# examples/bench for float16; for int8 these are the figures of a prototype on a processor with AVX512-VNNI.
_TOO_SMALL: dict[Implementation, int] = {"int8": 384 * 384, "float16": 512 * 512}
# Up to so many, int8 wins with many rows only: the layer keeps both forms of its weights.
_FEW_ROWS_UP_TO = 1024 * 1024
_FEW_ROWS = {"w8a32": 16, "w8a16": 8, "w8a8": 4}


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
    best: Implementation = "reference" if lacking else "int8"
    if lacking and has_float16_product():
        best = "float16"
    if best in _TOO_SMALL and weights <= _TOO_SMALL[best]:
        return Choice("float32", f"too small for {best} to be faster")
    if best == "int8":
        few = _FEW_ROWS[method.name] if weights <= _FEW_ROWS_UP_TO else 0
        return Choice("int8", "the processor has int8 products" + (f"; float32 below {few} rows" * bool(few)), few)
    return Choice(best, lacking)


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
