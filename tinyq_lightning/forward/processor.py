"""What the processor and the installed torch can do, found out once, by trying."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tinyq_lightning.errors import SpecError
from tinyq_lightning.forward.tracing import outside_modes

__all__ = [
    "Packed",
    "digit_product",
    "float16_product",
    "has_digit_product",
    "has_float16_product",
    "has_int8_product",
    "int8_product",
    "pack_digit",
    "pack_float16",
    "pack_int8",
    "unpack_digit",
    "unpack_float16",
    "unpack_int8",
]

Packed = object
"""Weights laid out for one of the products below; opaque."""

_HIDDEN = "TINYQ_WITHOUT"
_CAN_BE_HIDDEN = ("int8", "float16", "quantized")


@functools.cache
def has_int8_product() -> bool:
    """Whether int8 products are fast here and exact.

    Fast: the processor has the VNNI instructions. Exact: without them torch's operator may add pairs of
    products in 16 bits, which saturate; the largest digits and weights there are tell.
    """
    names = ("qlinear_prepack", "qlinear_pointwise")
    return not _hidden("int8") and _vnni() and _has_operator("onednn", *names) and _holds(_int8_product_is_exact)


@functools.cache
def has_digit_product() -> bool:
    """Whether int8 products of one digit can take it as floats: the conversion is part of the product then.

    Fast and exact as for :func:`has_int8_product`. The operator belongs to a family that torch means to drop.
    """
    names = ("linear_prepack", "linear_unpack", "linear_with_input_q_dq_qweight_dq_output_fp32")
    if _hidden("int8", "quantized") or not _vnni():
        return False
    return _has_operator("quantized", *names) and _holds(_digit_product_is_exact)


@functools.cache
def has_float16_product() -> bool:
    """Whether float32 activations can be multiplied with float16 weights, several times faster than rebuilding them."""
    names = ("linear_prepack_fp16", "linear_dynamic_fp16", "linear_unpack_fp16")
    hidden = _hidden("float16", "quantized")
    return not hidden and _has_operator("quantized", *names) and _holds(_float16_product_is_right)


def pack_int8(codes: Tensor) -> Packed:
    """Lay out codes ``[out, in]`` int8 for :func:`int8_product`: one byte a weight."""
    return torch.ops.onednn.qlinear_prepack(codes, None)


def unpack_int8(packed: Packed) -> Tensor:
    """The codes ``[out, in]`` int8 again."""
    return packed.to_dense().t().contiguous()  # type: ignore[attr-defined, no-any-return]


def int8_product(digits: Tensor, packed: Packed, scales: Tensor, zero_points: Tensor) -> Tensor:
    """``((digits − 128) @ qᵀ) * s``, the sums exact in int32.

    Args:
        digits: ``[rows, in]`` uint8.
        packed: from :func:`pack_int8`.
        scales: ``[out]`` float32.
        zero_points: ``[out]`` int32, zeros.

    Returns:
        ``[rows, out]`` float32, each rounded from its whole number once and by its scale once.
    """
    return _int8_operator()(digits, 1.0, 128, packed, scales, zero_points, None, 1.0, 0, torch.float32, "none", [], "")


def pack_digit(codes: Tensor, scales: Tensor) -> Packed:
    """Lay out codes ``[out, in]`` int8 and scales ``[out]`` float32 for :func:`digit_product`: one byte a weight."""
    zero_points = codes.new_zeros(len(codes), dtype=torch.int64)
    with warnings.catch_warnings(), _fbgemm():
        warnings.simplefilter("ignore")  # that torch means to drop quantized tensors
        weight = torch._make_per_channel_quantized_tensor(codes, scales.double(), zero_points, 0)
        return torch.ops.quantized.linear_prepack(weight, None)


def unpack_digit(packed: Packed) -> Tensor:
    """The codes ``[out, in]`` int8 again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight: Tensor = torch.ops.quantized.linear_unpack(packed)[0]
    return weight.int_repr()


def digit_product(whole: Tensor, packed: Packed) -> Tensor:
    """``(whole @ qᵀ) * s``, the sums exact in int32.

    Args:
        whole: ``[rows, in]`` float32, whole numbers of -128…127.
        packed: from :func:`pack_digit`.

    Returns:
        ``[rows, out]`` float32, each rounded from its whole number once and by its scale once.
    """
    return _digit_operator()(whole, 1.0, 128, packed)


def pack_float16(codes: Tensor) -> Packed:
    """Lay out codes ``[out, in]`` int8 for :func:`float16_product`: two bytes a weight, exact."""
    with _fbgemm():
        return torch.ops.quantized.linear_prepack_fp16(codes.float(), None)


def unpack_float16(packed: Packed) -> Tensor:
    """The codes ``[out, in]`` int8 again."""
    weight: Tensor = torch.ops.quantized.linear_unpack_fp16(packed)[0]
    return weight.to(torch.int8)


def float16_product(x: Tensor, packed: Packed) -> Tensor:
    """``x @ qᵀ``, summed in float32: ``[..., in]`` float32 → ``[..., out]`` float32."""
    return torch.ops.quantized.linear_dynamic_fp16.default(x, packed)  # type: ignore[no-any-return]


# Looked up once: that alone costs a microsecond.
@functools.cache
def _int8_operator() -> Callable[..., Tensor]:
    return torch.ops.onednn.qlinear_pointwise.default


@functools.cache
def _digit_operator() -> Callable[..., Tensor]:
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default


def _holds(check: Callable[[], bool]) -> bool:
    """Whether it does: not where an operator has another signature, or is not for this processor."""
    try:
        with outside_modes(), torch.inference_mode(False), torch.no_grad():
            return check()
    except (RuntimeError, TypeError, NotImplementedError, AttributeError):
        return False


# Whatever the user's default device and dtype, these are float32 on the CPU.
def _int8_product_is_exact() -> bool:
    codes = torch.full((32, 256), 127, dtype=torch.int8, device="cpu")
    digits = codes.new_full((2, 256), 255, dtype=torch.uint8)
    scales, zero_points = codes.new_ones(32, dtype=torch.float32), codes.new_zeros(32, dtype=torch.int32)
    return bool((int8_product(digits, pack_int8(codes), scales, zero_points) == 256 * 127 * 127).all())


def _digit_product_is_exact() -> bool:
    codes = torch.full((32, 256), 127, dtype=torch.int8, device="cpu")
    packed = pack_digit(codes, codes.new_ones(32, dtype=torch.float32))
    largest = codes.new_full((2, 256), 127, dtype=torch.float32)
    return bool((digit_product(largest, packed) == 256 * 127 * 127).all()) and torch.equal(unpack_digit(packed), codes)


def _float16_product_is_right() -> bool:
    codes = torch.arange(-127, 128, dtype=torch.int8, device="cpu")[:, None].expand(-1, 32).contiguous()
    product = float16_product(codes.new_ones(2, 32, dtype=torch.float32), pack_float16(codes))
    return torch.equal(product, codes.float().sum(1).expand(2, -1))


@contextmanager
def _fbgemm() -> Iterator[None]:
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


def _vnni() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        able = torch.cpu.get_capabilities()
        return bool(able.get("avx512_vnni") or able.get("avx_vnni"))
    probe = getattr(torch.cpu, "_is_vnni_supported", None) or getattr(torch.cpu, "_is_avx512_vnni_supported", None)
    return probe is not None and bool(probe())


def _hidden(*names: str) -> bool:
    """Whether the environment hides one of these from the layers, to play another processor or another torch.

    ``TINYQ_WITHOUT`` is a list with commas: ``int8``, the int8 instructions; ``float16``, the float16 product;
    ``quantized``, the operators ``torch.ops.quantized``.
    """
    listed = [name.strip() for name in os.environ.get(_HIDDEN, "").split(",") if name.strip()]
    if unknown := set(listed) - set(_CAN_BE_HIDDEN):
        allowed = ", ".join(_CAN_BE_HIDDEN)
        raise SpecError(f"the environment variable {_HIDDEN} hides {', '.join(sorted(unknown))}: it takes {allowed}")
    return not set(names).isdisjoint(listed)


def _has_operator(namespace: str, *names: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return all(hasattr(getattr(torch.ops, namespace), name) for name in names)
