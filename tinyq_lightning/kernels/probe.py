"""What the processor and the installed torch can do, found out once, by trying."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from tinyq_lightning.errors import SpecError
from tinyq_lightning.kernels.tracing import outside_modes

__all__ = [
    "Packed",
    "can",
    "fbgemm",
    "has_amx",
    "has_operator",
    "has_vnni",
    "holds",
    "is_hidden",
]

Packed = object
"""Weights laid out for one of the products below; opaque."""


_HIDDEN = "TINYQ_WITHOUT"


_CAN_BE_HIDDEN = ("int8", "int8-split", "amx", "float16", "quantized")


def holds(check: Callable[[], bool]) -> bool:
    """Whether it does: not where an operator has another signature, or is not for this processor."""
    try:
        with outside_modes():
            return check()
    except (RuntimeError, TypeError, NotImplementedError, AttributeError):
        return False


@contextmanager
def fbgemm() -> Iterator[None]:
    """The library that has these operators, whichever the user has chosen for theirs."""
    chosen = torch.backends.quantized.engine
    if chosen in ("x86", "fbgemm"):
        yield
        return
    torch.backends.quantized.engine = "fbgemm"
    try:
        yield
    finally:
        torch.backends.quantized.engine = chosen


def can(*instructions: str) -> bool:
    """Whether torch says that the processor has one of these; a torch that does not tell says of none."""
    able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(able.get(name) for name in instructions)


def has_vnni() -> bool:
    """Whether the processor has int8 products that add up in 32 bits: AVX512-VNNI or AVX-VNNI."""
    if hasattr(torch.cpu, "get_capabilities"):
        return can("avx512_vnni", "avx_vnni")
    probe = getattr(torch.cpu, "_is_vnni_supported", None) or getattr(torch.cpu, "_is_avx512_vnni_supported", None)
    return probe is not None and bool(probe())


@functools.cache
def has_amx() -> bool:
    """Whether the processor multiplies tiles of int8, as oneDNN does with packed codes there: AMX."""
    return not is_hidden("amx") and has_vnni() and can("amx_int8")


def is_hidden(*names: str) -> bool:
    """Whether the environment hides one of these from the layers, to play another processor or another torch.

    ``TINYQ_WITHOUT`` is a list with commas: ``int8``, the int8 instructions; ``int8-split``, what is done with int8
    products where there are none; ``amx``, that the processor multiplies tiles (``ONEDNN_MAX_CPU_ISA`` hides it from
    oneDNN); ``float16``, the float16 product; ``quantized``, the operators
    ``torch.ops.quantized``.
    """
    listed = [name.strip() for name in os.environ.get(_HIDDEN, "").split(",") if name.strip()]
    if unknown := set(listed) - set(_CAN_BE_HIDDEN):
        allowed = ", ".join(_CAN_BE_HIDDEN)
        raise SpecError(f"the environment variable {_HIDDEN} hides {', '.join(sorted(unknown))}: it takes {allowed}")
    return not set(names).isdisjoint(listed)


def has_operator(namespace: str, *names: str) -> bool:
    """Whether the installed torch has all of these operators."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return all(hasattr(getattr(torch.ops, namespace), name) for name in names)
