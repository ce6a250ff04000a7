"""Products of plain codes by ``torch._int_mm``: operator by operator, and as a formula that compilers can fuse.

In a graph the activations are split into int8 digits as in :mod:`~tinyq_lightning.kernels.fixed_point`, by functional
operators. Nothing is packed, so a graph holds the codes as they are in the layer's buffer. On a GPU layers compute by
the same formula outside of graphs too: its products are cuBLAS's, whose sums of integers neither TF32 nor autocast
concern.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import override

from tinyq_lightning.kernels.base import LONGEST_SUM, SUM_MAX, BesideCodes
from tinyq_lightning.kernels.fixed_point import digits_product
from tinyq_lightning.kernels.onednn import holds_packed_constants, onednn_sums, pack_onednn
from tinyq_lightning.kernels.probe import has_vnni, holds, is_hidden
from tinyq_lightning.kernels.tracing import is_exporting
from tinyq_lightning.kernels.weights import CODE_MAX, quantize_rows_to_steps
from tinyq_lightning.methods import Method

__all__ = [
    "PlainWeights",
    "digits_of_integers",
    "has_cuda_product",
    "has_plain_product",
    "int_mm",
    "integer_product",
    "multiplies_exactly",
    "padded_int_mm",
    "put_together",
    "scaled_sums",
    "takes_integers",
]


# cuBLAS takes more than 16 rows, and features and outputs in whole multiples of this.
_FEWEST_ROWS, _MULTIPLE = 32, 8


# It may take any address for a multiple of so many bytes, as those of whole tensors are.
_ALIGNMENT = 256


@functools.cache
def has_plain_product() -> bool:
    """Return True if ``torch._int_mm`` is fast and exact on this processor."""
    able = not is_hidden("int8") and has_vnni() and hasattr(torch, "_int_mm")
    return able and holds(lambda: multiplies_exactly(torch._int_mm))


@functools.cache
def has_cuda_product() -> bool:
    """Return True if :func:`int_mm` is exact on this machine's GPU."""
    able = not is_hidden("int8") and hasattr(torch, "_int_mm") and torch.cuda.is_available()
    return able and holds(lambda: multiplies_exactly(lambda digits, by_columns: int_mm(digits, by_columns.t()), "cuda"))


def takes_integers(in_features: int, device: str = "cpu") -> bool:
    """Return True if :func:`integer_product` is exact here for so many features; so is :class:`PlainWeights` on a CPU.

    Args:
        in_features: how many products are summed.
        device: the type of device; False for those that are neither ``cpu`` nor ``cuda``.
    """
    if in_features > LONGEST_SUM or device not in ("cpu", "cuda"):
        return False
    # With one feature torch._int_mm returns wrong numbers on CPUs (torch 2.13).
    return has_cuda_product() if device == "cuda" else in_features >= 2 and has_plain_product()


class PlainWeights(BesideCodes):
    """The codes as they are in the layer's buffer."""

    bytes_a_weight = 0

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__(codes, scales)
        self._by_columns = codes.t()

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        return digits_product(method, x, self._sums, scales, bias, signed=True)

    def _sums(self, digits: Tensor) -> Tensor:
        return torch._int_mm(digits, self._by_columns)


def integer_product(x: Tensor, int8_weights: Tensor, scales: Tensor, method: Method) -> Tensor:
    """``x @ (q * s)ᵀ`` with the activations held in ``method.digits`` int8 digits, on the CPU or a GPU.

    Args:
        x: ``[..., in]`` float32.
        int8_weights: ``[out, in]`` int8.
        scales: ``[out]`` float32.
        method: how finely activations are held.

    Returns:
        ``[..., out]`` float32. A row with NaN or infinity gives no finite value.
    """
    rows = _computed_once(x.reshape(-1, x.shape[-1]))
    integers, step = quantize_rows_to_steps(rows, method.steps)
    out = scaled_sums(integers, int8_weights, scales, method) * step
    return out.view(*x.shape[:-1], int8_weights.shape[0])


def _computed_once(rows: Tensor) -> Tensor:
    """``[rows, in]`` as torch's compiler is to have it in memory, where a graph is compiled for the CPU.

    The largest value of a row is needed before it can be rounded. A compiler that fuses both with what computes the row
    may do that twice, which costs more than memory where it is a GELU. It has no operator to ask for; it must have in
    memory what is read by strides. These are of a copy, which it does not make: it may lay out views as eager code does
    not. They are told, not asked for: torch's tracer takes no strides that depend on a dynamic size.
    """
    if not (torch.compiler.is_dynamo_compiling() and not is_exporting() and rows.is_cpu and type(rows) is Tensor):
        return rows
    rows = rows.clone(memory_format=torch.contiguous_format)
    return rows.as_strided(rows.shape, (rows.shape[1], 1))


def scaled_sums(integers: Tensor, int8_weights: Tensor, scales: Tensor, method: Method) -> Tensor:
    """``integers @ (q * s)ᵀ``: ``[rows, in]`` integers as floats → ``[rows, out]`` likewise, each digit's sums exact.

    A package that is compiled for this processor holds packed codes, whose sums beyond 2²⁴ lose their last bits.
    """
    if integers.is_cpu and _is_packed(method, int8_weights.shape[1]):
        sums = _packed_sums(integers, int8_weights, scales, method.digits)
    else:
        sums = int_mm(digits_of_integers(integers, method.digits), int8_weights).to(integers.dtype)
    return put_together(sums, method.digits) * scales


def put_together(sums: Tensor, count: int) -> Tensor:
    """The sums of all digits, lowest first, as those of integers: ``[count * rows, out]`` → ``[rows, out]`` floats."""
    low, *higher = sums.view(count, sums.shape[0] // count, sums.shape[1]).unbind()  # dynamic shapes: no chunks
    for place, part in enumerate(higher, 1):
        low = low + part * 256.0**place
    return low


def _is_packed(method: Method, in_features: int) -> bool:
    """Whether a package is traced that holds packed codes.

    It multiplies digits plus 128, and takes 128 off when the sums are float32. Sums beyond 2²⁴ lose their last bits by
    that: nothing beside the rounding of activations to one digit, but too much for the upper digits of finer ones.
    """
    return holds_packed_constants() and (method.digits == 1 or 255 * CODE_MAX * in_features < SUM_MAX)


def _packed_sums(integers: Tensor, int8_weights: Tensor, scales: Tensor, count: int) -> Tensor:
    """The sums of all digits, lowest first: ``[rows, in]`` integers as floats → ``[count * rows, out]`` likewise."""
    words = integers.to(torch.int32) + 0x808080 % 256**count  # their bytes are the digits plus 128
    digits = [(words >> 8 * place & 255).to(torch.uint8) for place in range(count)]
    # The compiler must know these while it compiles: it does of what is computed from scales, not of torch.ones.
    ones, zero_points = scales / scales, (scales - scales).view(torch.int32)
    return onednn_sums(torch.cat(digits), pack_onednn(int8_weights), ones, zero_points)


def int_mm(digits: Tensor, codes: Tensor) -> Tensor:
    """``digits @ qᵀ``: ``[rows, in]`` int8 and ``[out, in]`` int8 → ``[rows, out]`` int32, exact."""
    return torch._int_mm(digits, codes.t()) if digits.is_cpu else padded_int_mm(digits, codes)


def padded_int_mm(digits: Tensor, codes: Tensor) -> Tensor:
    """As :func:`int_mm`, with zeros around digits and codes where a GPU's library refuses their sizes.

    Both are given to it by rows, and from addresses that it may expect.
    """
    (rows, features), outputs = digits.shape, codes.shape[0]
    more_rows, more_features, more_outputs = max(0, _FEWEST_ROWS - rows), _missing(features), _missing(outputs)
    if more_rows or more_features:
        digits = nn.functional.pad(digits, (0, more_features, 0, more_rows))
    if more_outputs or more_features:
        codes = nn.functional.pad(codes, (0, more_features, 0, more_outputs))
    sums = torch._int_mm(_aligned(digits), _aligned(codes).t())
    return sums[:rows, :outputs] if more_rows or more_outputs else sums


def _aligned(matrix: Tensor) -> Tensor:
    matrix = matrix.contiguous()
    if torch.compiler.is_compiling():  # graphs cannot ask for addresses
        return matrix
    return matrix.clone() if matrix.storage_offset() % _ALIGNMENT else matrix


def _missing(size: int) -> int:
    return -size % _MULTIPLE if size else _MULTIPLE


def digits_of_integers(integers: Tensor, count: int) -> Tensor:
    """The digits, lowest first: ``[rows, ...]`` integers as floats → ``[count * rows, ...]`` int8."""
    if count == 1:
        return integers.to(torch.int8)
    rest, digits = integers.to(torch.int32), []
    for _ in range(count - 1):
        low = (rest << 24) >> 24
        digits.append(low.to(torch.int8))
        rest = (rest - low) >> 8
    return torch.cat([*digits, rest.to(torch.int8)])


def multiplies_exactly(product: Callable[[Tensor, Tensor], Tensor], device: str = "cpu") -> bool:
    """Whether the largest digits do not saturate in a product, and random ones of several sizes give exact sums.

    Args:
        product: ``[rows, in]`` int8 digits and ``[in, out]`` int8 codes → ``[rows, out]`` sums.
        device: where the product is tried.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    for rows, columns, outputs in ((1, 256, 32), (3, 256, 32), (5, 2, 3), (17, 33, 50)):
        codes = torch.randint(-127, 128, (outputs, columns), generator=generator, dtype=torch.int8, device="cpu")
        digits = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8, device="cpu")
        most = torch.full_like(codes, 127)
        for a, b in ((digits, codes), *((torch.full_like(digits, largest), most) for largest in (-128, 127))):
            sums = product(a.to(device), b.to(device).t())
            if not torch.equal(sums.double().cpu(), a.double() @ b.double().t()):
                return False
    return True
