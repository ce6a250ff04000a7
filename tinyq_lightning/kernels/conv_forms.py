"""The forms of a convolution's weights that kernels take, and the convolution of each.

The int8 forms hold the activations as fixed point in int8 digits, as linear layers do: one exact convolution for each
digit. No sum is rounded on the way, so a sample's result depends neither on its batch nor on the number of threads.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from tinyq_lightning.kernels.base import STEPS, BesideCodes, CodeHolder, WeightForm, plus_bias
from tinyq_lightning.kernels.convolution import Geometry, convolve, output_sizes, per_channel, sample_steps
from tinyq_lightning.kernels.int8 import Int8Weights
from tinyq_lightning.kernels.integer import has_plain_int8_product
from tinyq_lightning.kernels.probe import Packed, has_operator, has_vnni, holds, is_hidden
from tinyq_lightning.kernels.weights import dequantize
from tinyq_lightning.methods import Method

__all__ = [
    "CONV_FORMS",
    "ConvForm",
    "FloatConvWeights",
    "Int8ConvWeights",
    "Int8GroupedWeights",
    "has_int8_convolution",
    "is_channels_last",
    "layout_of",
    "takes_matrix_product",
]

# Samples are convolved so many values at a time: what is made of them on the way stays in the cache.
_VALUES_AT_ONCE = 131_072


# With fewer places a sample, the values of all samples are put in the order of rows for one product.
_PLACES_OF_A_SAMPLE = 256


_BITS = torch.tensor(8, dtype=torch.int32, device="cpu")


# Adding this to a float32 rounds it to an integer (ties to even, as `round`), which is then in the low bits.
_ROUNDING = torch.tensor(1.5 * 2**23, dtype=torch.float32, device="cpu")


# 128 in each digit: added to an integer, it makes its bytes the digits plus 128.
_OFFSETS = {1: 0x80, 2: 0x8080, 3: 0x808080}


_ROUNDING_PLUS = {count: _ROUNDING + _OFFSETS[count] for count in (1, 2)}


_HALF = torch.tensor(0x80, dtype=torch.int32, device="cpu")


def layout_of(x: Tensor) -> torch.memory_format:
    """The order in memory in which torch's convolutions return what they make of ``x`` ``[N, C, ...]``."""
    return _LAYOUTS[x.dim()] if is_channels_last(x) else torch.contiguous_format


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a place lie side by side, and not the places of a channel.

    By the strides, as torch has it, also where there is one place.
    """
    layout = _LAYOUTS.get(x.dim())
    if layout is None or x.shape[1] == 1 or x.stride(1) != 1 or x.stride(-1) != x.shape[1]:
        return False
    return x.is_contiguous(memory_format=layout)


_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


@functools.cache
def has_int8_convolution() -> bool:
    """Return True if int8 convolutions are fast and exact on this machine.

    Fast: the processor has the VNNI instructions. Exact: without them torch's operator may add pairs of products in 16
    bits, which saturate; the probe convolves the largest digits and weights, with borders, to find out.
    """
    names = ("qconv_prepack", "qconv_pointwise")
    return not is_hidden("int8") and has_vnni() and has_operator("onednn", *names) and holds(_is_exact)


def takes_matrix_product(codes: Tensor, geometry: Geometry) -> bool:
    """Whether the convolution is a matrix product of channels that ``torch._int_mm`` computes exactly here."""
    pointwise = codes[0, 0].numel() == 1 and geometry.groups == 1 and not geometry.transposed
    plain = all(each == 1 for each in geometry.stride) and not any(geometry.padding)
    # With one channel torch._int_mm returns wrong numbers (torch 2.13).
    return pointwise and plain and codes.shape[1] > 1 and has_plain_int8_product()


class ConvForm(WeightForm):
    """Weights of a convolution laid out for one kernel.

    Args:
        codes: ``q``, ``[out, in / groups, ...]`` int8.
        scales: ``s``, ``[out]`` float32.
        geometry: how the convolution moves over its input.
        shape: of the first input ``[N, in, ...]``, for which the weights are laid out; others take them too.
    """

    _flat = False

    def __init__(self, codes: Tensor, scales: Tensor, geometry: Geometry, shape: torch.Size) -> None:
        super().__init__(codes, scales)  # type: ignore[safe-super]  # of the class beside this one
        self.geometry = geometry
        self.kernel_size = tuple(codes.shape[2:])

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of ``x`` ``[N, in, ...]`` float32 → ``[N, out, ...]`` float32, new memory."""
        layout = layout_of(x)
        x = x.contiguous(memory_format=layout)
        added = None if bias is None else per_channel(bias.float(), x.dim() + self._flat)
        sizes = output_sizes(tuple(x.shape[2:]), self.kernel_size, self.geometry)
        out = torch.empty(len(x), len(scales), *sizes, dtype=torch.float32, memory_format=layout)
        if not out.numel():
            return out
        at_once = max(1, _VALUES_AT_ONCE // x[0].numel())
        if len(x) <= at_once:
            self._convolve(method, x, scales, added, out)
        else:
            for part, into in zip(torch.split(x, at_once), torch.split(out, at_once), strict=True):
                self._convolve(method, part, scales, added, into)
        return out

    def _convolve(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Convolve some samples; ``bias`` is ``[out, 1, ...]``."""
        if self._flat:  # the operator takes two dimensions or three
            x, out = x.unsqueeze(2), out.unsqueeze(2)
        step = _steps(x, STEPS[method.digits])
        sums = self._of_integers(torch.div(x, step), method.digits, scales)
        if is_channels_last(sums) and not is_channels_last(out):
            for placed, into in zip(sums, out, strict=True):
                # torch copies a transposed matrix much faster than it reorders more dimensions
                into.flatten(1).copy_(placed.movedim(0, -1).flatten(0, -2).t())
            plus_bias(out.mul_(step), bias)
        else:
            plus_bias(torch.mul(sums, step, out=out), bias)

    @abstractmethod
    def _of_integers(self, numbers: Tensor, digits: int, scales: Tensor) -> Tensor:
        """The convolution of rounded ``numbers``, which is overwritten, times the scales: exact sums, rounded once."""


class _PackedConvolution(ConvForm):
    """The codes laid out for exact convolutions of integers by oneDNN."""

    def __init__(self, codes: Tensor, scales: Tensor, geometry: Geometry, shape: torch.Size) -> None:
        super().__init__(codes, scales, geometry, shape)
        self._flat = codes.dim() == 3
        self._of_operator = replace(
            geometry,
            stride=(1,) * self._flat + geometry.stride,
            padding=(0,) * self._flat + geometry.padding,
            dilation=(1,) * self._flat + geometry.dilation,
        )
        plain = codes.unsqueeze(2) if self._flat else codes
        self._places = tuple(plain.shape[2:])
        first = [*shape[:2], *(1,) * self._flat, *shape[2:]]
        self._packed = pack_convolution(plain.contiguous(), self._of_operator, first)
        self._zero_points = codes.new_zeros(len(codes), dtype=torch.int32)

    @override
    def _of_integers(self, numbers: Tensor, digits: int, scales: Tensor) -> Tensor:
        moves, pads = _moves_of_operator(tuple(numbers.shape[2:]), self._places, self._of_operator)
        x = numbers if pads is None else nn.functional.pad(numbers, pads)
        layout = _LAYOUTS[x.dim()]
        parts = []
        for digit in _digits(x, digits, signed=False):
            placed = digit.contiguous(memory_format=layout)
            parts.append(int8_convolution(placed, self._packed, scales, self._zero_points, moves))
        return _joined(parts)


class Int8ConvWeights(_PackedConvolution, CodeHolder):
    """The codes in one byte each, for exact convolutions of integers in one group."""

    @override
    def _unpacked(self) -> Tensor:
        codes = cast(Tensor, self._packed.to_dense()).contiguous()  # type: ignore[attr-defined]
        return codes.view(self.shape)


class Int8GroupedWeights(_PackedConvolution, BesideCodes):
    """The same for several groups, beside the plain codes: to unpack groups writes past their memory (oneDNN 3.12)."""


class PointwiseWeights(ConvForm, BesideCodes):
    """The plain codes, for convolutions that are matrix products of channels."""

    @override
    def _of_integers(self, numbers: Tensor, digits: int, scales: Tensor) -> Tensor:
        codes = self.codes().flatten(1)
        samples, channels, *sizes = numbers.shape
        by_rows = is_channels_last(numbers)
        places = numbers[0, 0].numel()
        rows = numbers.flatten(2).transpose(1, 2) if by_rows or (samples > 1 and places < _PLACES_OF_A_SAMPLE) else None
        parts = []
        for digit in _digits(numbers if rows is None else rows, digits, signed=True):
            if rows is not None:
                sums = torch._int_mm(digit.reshape(-1, channels), codes.t()).view(samples, places, -1)
                parts.append(sums.float().mul_(scales).transpose(1, 2))
            else:
                sums = torch.stack([torch._int_mm(codes, each) for each in digit.flatten(2)])
                parts.append(sums.float().mul_(scales[:, None]))
        return torch.unflatten(_joined(parts), 2, sizes)


class Float32ConvCodes(ConvForm, BesideCodes):
    """A float copy of the codes, for rounded activations.

    Sums of integers below 2²⁴ are exact, so that w8a8 gives the same bits as by any other kernel.
    """

    def __init__(self, codes: Tensor, scales: Tensor, geometry: Geometry, shape: torch.Size) -> None:
        super().__init__(codes, scales, geometry, shape)
        self._float_codes = codes.float()

    @override
    def _of_integers(self, numbers: Tensor, digits: int, scales: Tensor) -> Tensor:
        out = convolve(numbers.round_(), self._float_codes, None, self.geometry)
        return out.mul_(per_channel(scales, out.dim()))


class WindowWeights(ConvForm, CodeHolder):
    """The codes as a linear layer's int8 kernel takes them, for few windows: each is a row, with a step of its own."""

    def __init__(self, codes: Tensor, scales: Tensor, geometry: Geometry, shape: torch.Size) -> None:
        super().__init__(codes, scales, geometry, shape)
        self._rows = Int8Weights(codes.flatten(1), scales)

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        sizes = output_sizes(tuple(x.shape[2:]), self.kernel_size, self.geometry)
        flat = (1,) * (4 - x.dim())  # unfold takes two dimensions
        zeros = (0,) * len(flat)
        windows = nn.functional.unfold(
            x.view(*x.shape[:2], *flat, *x.shape[2:]) if flat else x,
            flat + self.kernel_size,
            flat + self.geometry.dilation,
            zeros + self.geometry.padding,
            flat + self.geometry.stride,
        )
        rows = windows.transpose(1, 2).flatten(0, 1).contiguous()
        out = self._rows.product(method, rows, scales, bias).view(len(x), *sizes, -1).movedim(-1, 1)
        return out.contiguous(memory_format=layout_of(x))

    @override
    def _of_integers(self, numbers: Tensor, digits: int, scales: Tensor) -> Tensor:
        raise NotImplementedError

    @override
    def _unpacked(self) -> Tensor:
        return self._rows.codes().view(self.shape)


class FloatConvWeights(ConvForm, BesideCodes):
    """A float copy of the weights, for activations as they are.

    Attributes:
        weight: ``q * s``, of the shape of the codes, float32.
    """

    def __init__(self, codes: Tensor, scales: Tensor, geometry: Geometry, shape: torch.Size) -> None:
        super().__init__(codes, scales, geometry, shape)
        self.weight = dequantize(codes, scales, groups=geometry.transposed_groups)

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        return convolve(x, self.weight, None if bias is None else bias.float(), self.geometry)

    @override
    def _of_integers(self, numbers: Tensor, digits: int, scales: Tensor) -> Tensor:
        raise NotImplementedError


CONV_FORMS: dict[str, type[ConvForm]] = {
    "int8": Int8ConvWeights,
    "int8grouped": Int8GroupedWeights,
    "int8mm": PointwiseWeights,
    "windows": WindowWeights,
    "float32": FloatConvWeights,
    "float32x1": Float32ConvCodes,
}
"""The form of the weights that each kernel of convolutions takes; others take the plain codes."""


def pack_convolution(codes: Tensor, geometry: Geometry, shape: list[int] | None) -> Packed:
    """Lay out codes ``[out, in / groups, ...]`` int8 for inputs of ``shape``: one byte a weight."""
    ones = codes.new_ones(len(codes), dtype=torch.float32)
    moves = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    return torch.ops.onednn.qconv_prepack(codes, ones, 1.0, 128, *moves, shape)


def int8_convolution(digits: Tensor, packed: Packed, scales: Tensor, zero_points: Tensor, geometry: Geometry) -> Tensor:
    """The convolution of ``digits − 128`` with the codes, times ``scales``; the sums are exact in int32.

    Args:
        digits: ``[N, in, ...]`` uint8, with channels last.
        packed: from :func:`pack_convolution`.
        scales: ``[out]`` float32.
        zero_points: ``[out]`` int32, zeros.
        geometry: how the convolution moves over the input. It is padded with zeros.

    Returns:
        ``[N, out, ...]`` float32 with channels last, rounded once from its integer sum and once by its scale.
    """
    moves = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    return _operator()(
        digits, 1.0, 128, packed, scales, zero_points, None, *moves, 1.0, 0, torch.float32, "none", [], ""
    )


@functools.lru_cache(maxsize=1024)
def _moves_of_operator(
    sizes: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry
) -> tuple[Geometry, list[int] | None]:
    """How the operator moves over an input of these sizes, and what is added to it, or cut off, before; None if not.

    Where a window lies in the padding altogether, and where one window is all that a stride leaves, the operator
    returns wrong numbers or breaks (oneDNN 3.12): such inputs are padded before, and cut to what is used of them.
    """
    spans = tuple(gap * (width - 1) + 1 for gap, width in zip(geometry.dilation, kernel, strict=True))
    counts = output_sizes(sizes, kernel, geometry)
    inside = all(pad < span for pad, span in zip(geometry.padding, spans, strict=True))
    if inside and all(count > 1 or stride == 1 for count, stride in zip(counts, geometry.stride, strict=True)):
        return geometry, None
    pads: list[int] = []
    for size, span, stride, pad, count in zip(sizes, spans, geometry.stride, geometry.padding, counts, strict=True):
        pads = [pad, (count - 1) * stride + span - size - pad, *pads]  # the last dimension comes first
    strides = tuple(1 if count == 1 else stride for count, stride in zip(counts, geometry.stride, strict=True))
    return replace(geometry, stride=strides, padding=(0,) * len(sizes)), pads


@functools.cache  # because the lookup costs a microsecond
def _operator() -> Callable[..., Tensor]:
    return torch.ops.onednn.qconv_pointwise.default


def _steps(x: Tensor, steps: Tensor) -> Tensor:
    """As :func:`sample_steps`, with the same bits; absolute values would have to be written before they are read."""
    if len(x) * x[0].numel() < _FEW_VALUES:
        return sample_steps(x, steps)
    flat = x.permute(0, *range(2, x.dim()), 1).flatten(1) if is_channels_last(x) else x.flatten(1)
    largest = torch.maximum(flat.amax(1), flat.amin(1).neg_()).div_(steps).clamp_min_(_SMALLEST_STEP)
    return largest.view(-1, *[1] * (x.dim() - 1))


_FEW_VALUES = 8192


_SMALLEST_STEP = torch.finfo(torch.float32).tiny


def _digits(numbers: Tensor, count: int, signed: bool) -> Iterator[Tensor]:
    """The digits of rounded ``numbers``, the lowest first: int8, or each plus 128 uint8. ``numbers`` is overwritten."""
    if count < 3:
        integers = numbers.add_(_ROUNDING if signed else _ROUNDING_PLUS[count]).view(torch.int32)
    else:  # integers of three digits are too large for rounding by addition
        integers = numbers.round_().int()
        integers = integers if signed else integers.add_(_OFFSETS[count])
    for place in range(count):
        if place:
            integers = (integers.add_(_HALF) if signed else integers).bitwise_right_shift_(_BITS)
        yield integers.to(torch.int8 if signed else torch.uint8)


def _joined(parts: list[Tensor]) -> Tensor:
    low, *higher = parts
    for place, part in enumerate(higher, 1):
        low.add_(part, alpha=256**place)
    return low


def _is_exact() -> bool:
    """Whether the largest digits do not saturate, and random ones give exact sums, up to the borders."""
    generator = torch.Generator("cpu").manual_seed(0)
    for channels, outputs, groups, kernel, sizes in (
        (64, 32, 1, (3, 3), (6, 5)),
        (6, 6, 6, (3, 3), (7, 7)),
        (3, 8, 1, (1, 5), (1, 9)),
        (8, 4, 2, (2, 3, 2), (3, 4, 5)),
    ):
        shapes = (outputs, channels // groups, *kernel), (2, channels, *sizes)
        codes, digits = (torch.randint(-127, 128, each, generator=generator, device="cpu") for each in shapes)
        codes, digits = codes.to(torch.int8), digits.int()
        ones = (1,) * len(kernel)
        geometry = Geometry(ones, tuple(width // 2 for width in kernel), ones, groups)
        for a, b in ((digits, codes), (torch.full_like(digits, -128), torch.full_like(codes, 127))):
            placed = (a + 128).byte().contiguous(memory_format=_LAYOUTS[a.dim()])
            scales, zeros = codes.new_ones(outputs, dtype=torch.float32), codes.new_zeros(outputs, dtype=torch.int32)
            got = int8_convolution(placed, pack_convolution(b, geometry, None), scales, zeros, geometry)
            if not torch.equal(got.double(), convolve(a.double(), b.double(), None, geometry)):
                return False
    return True
