"""Linear layers by int8 products: the activations as fixed point, in int8 digits.

Each row is ``x = step · n`` with whole numbers ``n``, written in balanced base 256: digits of
-128…127. Then ``x @ qᵀ`` is one int8 product for each digit, summed exactly, and the parts are put together
by powers of 256. The digits of all rows are stacked, so that the weights are read once. No sum is ever
rounded on the way, so a row's result does not depend on its batch, nor on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinyq_lightning.forward.methods import METHODS, Method
from tinyq_lightning.forward.processor import Packed, digit_product, int8_product
from tinyq_lightning.weight_math import activation_steps

__all__ = ["STEPS", "fixed_point_product", "one_digit_product"]

# Numbers are in tensors: torch would make one of each on each call.
STEPS = {method.digits: torch.tensor(method.steps, dtype=torch.float32, device="cpu") for method in METHODS.values()}
"""The largest whole number of the activations, by how many digits hold it."""

_BITS = torch.tensor(8, dtype=torch.int32, device="cpu")
# Half of each digit's range, in every digit: added to a number, it makes its bytes the digits plus 128.
_OFFSET = torch.tensor(0x808080, dtype=torch.int32, device="cpu")
# Added to a float32, it leaves nothing after the point, rounded to even as by `round`, and the number in the low bits.
_ROUNDING = {
    count: torch.tensor(1.5 * 2**23 + offset, dtype=torch.float32, device="cpu")
    for count, offset in ((1, 0x80), (2, 0x8080))
}
# Up to so many numbers operators cost more than bytes do.
_FEW_NUMBERS = 4096


def fixed_point_product(method: Method, x: Tensor, packed: Packed, scales: Tensor, zero_points: Tensor) -> Tensor:
    """``x @ (q * s)ᵀ`` with the activations held in ``method.digits`` int8 digits.

    Args:
        method: how finely activations are held.
        x: ``[rows, in]`` float32, contiguous.
        packed: the codes, from :func:`~tinyq_lightning.forward.processor.pack_int8`.
        scales: ``[out]`` float32.
        zero_points: ``[out]`` int32, zeros.

    Returns:
        ``[rows, out]`` float32. A row with NaN or infinity gives no finite value.
    """
    step = activation_steps(x, STEPS[method.digits])
    parts = int8_product(_digits(x / step, method.digits), packed, scales, zero_points)
    if method.digits == 1:
        return parts.mul_(step)
    low, *higher = parts.chunk(method.digits)
    for place, part in enumerate(higher, 1):
        low.add_(part, alpha=256**place)
    return low.mul(step)  # in memory of its own: saved or kept, it is not to take the other parts with it


def one_digit_product(x: Tensor, packed: Packed) -> Tensor:
    """``x @ (q * s)ᵀ`` with the activations held in one int8 digit, by fewer operators than above.

    Args:
        x: ``[rows, in]`` float32, contiguous.
        packed: the codes and scales, from :func:`~tinyq_lightning.forward.processor.pack_digit`.

    Returns:
        ``[rows, out]`` float32, with the same bits as above.
    """
    step = activation_steps(x, STEPS[1])
    return digit_product(torch.div(x, step).round_(), packed).mul_(step)


def _digits(numbers: Tensor, count: int) -> Tensor:
    """The digits of rounded ``numbers``, each plus 128: ``[rows, in]`` float32 → ``[count * rows, in]`` uint8.

    The lowest digits of all rows come first. ``numbers`` is overwritten.
    """
    by_adding = count < 3  # three digits are too large a number for it
    whole = numbers.add_(_ROUNDING[count]).view(torch.int32) if by_adding else numbers.round_().int().add_(_OFFSET)
    if count == 1:
        return whole.byte()
    rows, columns = whole.shape
    if rows == 1:
        return whole.view(torch.uint8).as_strided((count, columns), (1, 4)).contiguous()
    if rows * columns <= _FEW_NUMBERS:
        bytes_ = whole.view(torch.uint8).as_strided((count, rows, columns), (1, 4 * columns, 4))
        return bytes_.contiguous().view(-1, columns)
    digits = whole.new_empty(count * rows, columns, dtype=torch.uint8)
    for place, digit in enumerate(digits.chunk(count), 1):
        digit.copy_(whole)
        if place < count:
            whole.bitwise_right_shift_(_BITS)
    return digits
