"""What the processor and the installed torch can do, found out once, by trying."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

__all__ = [
    "Packed",
    "float16_product",
    "has_float16_product",
    "has_int8_product",
    "int8_product",
    "pack_float16",
    "pack_int8",
    "unpack_float16",
    "unpack_int8",
]

Packed = object
"""Weights laid out for one of the products below; opaque."""


@functools.cache
def has_int8_product() -> bool:
    """Whether int8 products are fast here and exact.

    Fast: the processor has the VNNI instructions. Exact: without them torch's operator may add pairs of
    products in 16 bits, which saturate; the largest digits and weights there are tell.
    """
    if not _vnni() or not _has_operator("onednn", "qlinear_prepack", "qlinear_pointwise"):
        return False
    try:
        return _int8_product_is_exact()
    except (
        RuntimeError,
        TypeError,
        NotImplementedError,
    ):  # an operator of another signature, or none for this processor
        return False


@functools.cache
def has_float16_product() -> bool:
    """Whether float32 activations can be multiplied with float16 weights, several times faster than rebuilding them."""
    if not _has_operator("quantized", "linear_prepack_fp16", "linear_dynamic_fp16", "linear_unpack_fp16"):
        return False
    try:
        codes = torch.arange(-127, 128, dtype=torch.int8)[:, None].expand(-1, 32).contiguous()
        product = float16_product(torch.ones(2, 32), pack_float16(codes))
        return torch.equal(product, codes.float().sum(1).expand(2, -1))
    except (RuntimeError, TypeError, NotImplementedError):
        return False


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
    return torch.ops.onednn.qlinear_pointwise.default(  # type: ignore[no-any-return]
        digits, 1.0, 128, packed, scales, zero_points, None, 1.0, 0, torch.float32, "none", [], ""
    )


def pack_float16(codes: Tensor) -> Packed:
    """Lay out codes ``[out, in]`` int8 for :func:`float16_product`: two bytes a weight, exact."""
    return torch.ops.quantized.linear_prepack_fp16(codes.float(), None)


def unpack_float16(packed: Packed) -> Tensor:
    """The codes ``[out, in]`` int8 again."""
    weight: Tensor = torch.ops.quantized.linear_unpack_fp16(packed)[0]
    return weight.to(torch.int8)


def float16_product(x: Tensor, packed: Packed) -> Tensor:
    """``x @ qᵀ``, summed in float32: ``[..., in]`` float32 → ``[..., out]`` float32."""
    return torch.ops.quantized.linear_dynamic_fp16.default(x, packed)  # type: ignore[no-any-return]


def _int8_product_is_exact() -> bool:
    codes = torch.full((32, 256), 127, dtype=torch.int8)
    digits = torch.full((2, 256), 255, dtype=torch.uint8)
    product = int8_product(digits, pack_int8(codes), torch.ones(32), torch.zeros(32, dtype=torch.int32))
    return bool((product == 256 * 127 * 127).all())


def _vnni() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        able = torch.cpu.get_capabilities()
        return bool(able.get("avx512_vnni") or able.get("avx_vnni"))
    probe = getattr(torch.cpu, "_is_vnni_supported", None) or getattr(torch.cpu, "_is_avx512_vnni_supported", None)
    return probe is not None and bool(probe())


def _has_operator(namespace: str, *names: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return all(hasattr(getattr(torch.ops, namespace), name) for name in names)
