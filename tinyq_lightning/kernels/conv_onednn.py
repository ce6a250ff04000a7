"""Int8 convolutions by oneDNN: exact sums of uint8 digits and int8 codes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from tinyq_lightning.kernels.base import BesideCodes, CodeHolder
from tinyq_lightning.kernels.conv_forms import RoundedConvForm, joined
from tinyq_lightning.kernels.conv_layout import LAYOUTS
from tinyq_lightning.kernels.convolution import Geometry, convolve, output_sizes
from tinyq_lightning.kernels.fixed_point import digits_of
from tinyq_lightning.kernels.probe import Packed, has_amx, has_operator, has_vnni, holds, is_hidden

__all__ = [
    "Int8ApartWeights",
    "Int8ConvWeights",
    "Int8GroupedWeights",
    "convolves_any_geometry",
    "has_int8_convolution",
    "int8_convolution",
    "pack_convolution",
]


@functools.cache
def has_int8_convolution() -> bool:
    """Return True if int8 convolutions are fast and exact on this machine.

    Fast: the processor has the VNNI instructions. Exact: without them torch's operator may add pairs of products in 16
    bits, which saturate; the probe convolves the largest digits and weights, with borders, to find out.
    """
    names = ("qconv_prepack", "qconv_pointwise")
    return not is_hidden("int8") and has_vnni() and has_operator("onednn", *names) and holds(lambda: _is_exact(_PROBES))


@functools.cache
def convolves_any_geometry() -> bool:
    """Return True if int8 convolutions are exact however they move, and whatever their groups: not so with AMX.

    oneDNN 3.12 returns wrong numbers there for some groups, and for some of each: long strides, kernels of even width,
    dilations, padding of one dimension alone, three dimensions. Wide groups show it soonest.
    """
    return holds(lambda: _is_exact(_PROBES_OF_WIDE_GROUPS))


# With AMX samples are convolved so many values at a time: a call costs more there beside its arithmetic. Measured on
# one thread, the layers of ResNet-18.
_VALUES_AT_ONCE_WITH_AMX = 524_288


class _PackedConvolution(RoundedConvForm):
    """The codes laid out for exact convolutions of integers by oneDNN."""

    bytes_a_weight = 1

    def __init__(self, codes: Tensor, scales: Tensor, geometry: Geometry, first: Tensor) -> None:
        super().__init__(codes, scales, geometry, first)
        self._flat = codes.dim() == 3
        if has_amx():
            self._values_at_once = _VALUES_AT_ONCE_WITH_AMX
        self._of_operator = replace(
            geometry,
            stride=(1,) * self._flat + geometry.stride,
            padding=(0,) * self._flat + geometry.padding,
            dilation=(1,) * self._flat + geometry.dilation,
        )
        plain = codes.unsqueeze(2) if self._flat else codes
        self._places = tuple(plain.shape[2:])
        sizes = (1,) * self._flat + tuple(first.shape[2:])
        moves, pads = _moves_of_operator(sizes, self._places, self._of_operator)
        if pads is not None:
            ends = zip(sizes, pads[-2::-2], pads[::-2], strict=True)
            sizes = tuple(size + before + after for size, before, after in ends)
        self._packed = pack_convolution(plain.contiguous(), moves, [*first.shape[:2], *sizes])
        self._zero_points = codes.new_zeros(len(codes), dtype=torch.int32)

    @override
    def _of_integers(self, numbers: Tensor, digits: int, scales: Tensor) -> Tensor:
        moves, pads = _moves_of_operator(tuple(numbers.shape[2:]), self._places, self._of_operator)
        x = numbers if pads is None else nn.functional.pad(numbers, pads)
        layout = LAYOUTS[x.dim()]
        parts = []
        for digit in digits_of(x, digits, signed=False):
            placed = digit.contiguous(memory_format=layout)
            parts.append(int8_convolution(placed, self._packed, scales, self._zero_points, moves))
        return joined(parts)


class Int8ConvWeights(_PackedConvolution, CodeHolder):
    """The codes in one byte each, for exact convolutions of integers in one group."""

    @override
    def _unpacked(self) -> Tensor:
        codes = cast(Tensor, self._packed.to_dense()).contiguous()  # type: ignore[attr-defined]
        return codes.view(self.shape)


class Int8GroupedWeights(_PackedConvolution, BesideCodes):
    """The same for several groups, beside the plain codes: to unpack groups writes past their memory (oneDNN 3.12)."""


class Int8ApartWeights(RoundedConvForm, CodeHolder):
    """The codes in one byte each, group by group, for groups that one call convolves wrongly."""

    bytes_a_weight = 1
    _values_at_once = 524_288  # of several groups, because each takes calls of its own

    def __init__(self, codes: Tensor, scales: Tensor, geometry: Geometry, first: Tensor) -> None:
        super().__init__(codes, scales, geometry, first)
        self._flat = codes.dim() == 3
        alone, groups = replace(geometry, groups=1), geometry.groups
        parts = zip(codes.chunk(groups), scales.chunk(groups), first.chunk(groups, 1), strict=True)
        self._groups = [Int8ConvWeights(own, factors, alone, x) for own, factors, x in parts]

    @override
    def _of_integers(self, numbers: Tensor, digits: int, scales: Tensor) -> Tensor:
        count = len(self._groups)
        parts = zip(self._groups, numbers.chunk(count, 1), scales.chunk(count), strict=True)
        return torch.cat([group._of_integers(x, digits, factors) for group, x, factors in parts], 1)

    @override
    def _unpacked(self) -> Tensor:
        return torch.cat([group._unpacked() for group in self._groups])


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
        digits, 1.0, 128, packed, scales.contiguous(), zero_points, None, *moves, 1.0, 0, torch.float32, "none", [], ""
    )


@functools.lru_cache(maxsize=1024)
def _moves_of_operator(
    sizes: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry
) -> tuple[Geometry, list[int] | None]:
    """How the operator moves over an input of these sizes, and what is added to it, or cut off, before; None if not.

    Where a window may lie in the padding altogether, its places on both sides of the input included, where a dimension
    of one place is padded, and where one window is all that a stride leaves, the operator returns wrong numbers or
    breaks (oneDNN 3.12): such inputs are padded before, and cut to what is used of them.
    """
    spans = tuple(gap * (width - 1) + 1 for gap, width in zip(geometry.dilation, kernel, strict=True))
    counts = output_sizes(sizes, kernel, geometry)
    places = zip(sizes, spans, geometry.padding, geometry.dilation, strict=True)
    inside = all(not pad or (pad < span and size > 1 and size >= gap) for size, span, pad, gap in places)
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


# Channels, outputs, groups, widths of the kernel, sizes of the input.
_Probe = tuple[int, int, int, tuple[int, ...], tuple[int, ...]]


_PROBES: tuple[_Probe, ...] = (
    (64, 32, 1, (3, 3), (6, 5)),
    (6, 6, 6, (3, 3), (7, 7)),
    (3, 8, 1, (1, 5), (1, 9)),
    (8, 4, 2, (2, 3, 2), (3, 4, 5)),
    (1, 8, 1, (3, 5, 5), (2, 6, 7)),
    (64, 64, 2, (3, 3), (5, 5)),
)


# With AMX all of these are wrong.
_PROBES_OF_WIDE_GROUPS: tuple[_Probe, ...] = (
    (6, 96, 2, (3, 3), (5, 5)),
    (32, 66, 2, (1, 5), (1, 14)),
    (48, 80, 2, (3, 3), (4, 7)),
)


def _is_exact(probes: Sequence[_Probe]) -> bool:
    """Whether the largest digits do not saturate, and random ones give exact sums, up to the borders."""
    generator = torch.Generator("cpu").manual_seed(0)
    for channels, outputs, groups, kernel, sizes in probes:
        shapes = (outputs, channels // groups, *kernel), (2, channels, *sizes)
        codes, digits = (torch.randint(-127, 128, each, generator=generator, device="cpu") for each in shapes)
        codes, digits = codes.to(torch.int8), digits.int()
        ones = (1,) * len(kernel)
        geometry = Geometry(ones, tuple(width // 2 for width in kernel), ones, groups)
        for a, b in ((digits, codes), (torch.full_like(digits, -128), torch.full_like(codes, 127))):
            placed = (a + 128).byte().contiguous(memory_format=LAYOUTS[a.dim()])
            scales, zeros = codes.new_ones(outputs, dtype=torch.float32), codes.new_zeros(outputs, dtype=torch.int32)
            got = int8_convolution(placed, pack_convolution(b, geometry, None), scales, zeros, geometry)
            if not torch.equal(got.double(), convolve(a.double(), b.double(), None, geometry)):
                return False
    return True
