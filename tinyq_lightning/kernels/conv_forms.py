"""The forms of a convolution's weights that kernels take, and the convolution of each.

The int8 forms hold the activations as fixed point in int8 digits, as linear layers do: one exact convolution for each
digit. No sum is rounded on the way, so a sample's result depends neither on its batch nor on the number of threads.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from typing_extensions import override

from tinyq_lightning.kernels.base import STEPS, BesideCodes, CodeHolder, WeightForm, plus_bias
from tinyq_lightning.kernels.conv_layout import is_channels_last, layout_of
from tinyq_lightning.kernels.convolution import (
    Geometry,
    convolve,
    output_sizes,
    per_channel,
    sample_steps,
    strided,
)
from tinyq_lightning.kernels.fixed_point import digits_of, row_steps
from tinyq_lightning.kernels.onednn import OnednnWeights
from tinyq_lightning.kernels.weights import dequantize
from tinyq_lightning.methods import Method

__all__ = [
    "ConvForm",
    "Float32ConvCodes",
    "FloatConvWeights",
    "PointwiseWeights",
    "RoundedConvForm",
    "WindowWeights",
    "joined",
]

# Samples are convolved so many values at a time: what is made of them on the way stays in the cache.
_VALUES_AT_ONCE = 131_072


# With fewer places a sample, the values of all samples are put in the order of rows for one product.
_PLACES_OF_A_SAMPLE = 256


# Below this size, call overhead costs more than memory traffic.
_FEW_VALUES = 8192


class ConvForm(WeightForm):
    """Weights of a convolution laid out for one kernel.

    Args:
        codes: ``q``, ``[out, in / groups, ...]`` int8.
        scales: ``s``, ``[out]`` float32.
        geometry: how the convolution moves over its input.
        first: a tensor of the shape of the first input ``[N, in, ...]``, for which the weights are laid out; others
            take them too. A float copy of the weights has its layout, which is to be that of the float weight: torch's
            convolutions return channels last if the input has them, or the weight.
    """

    def __init__(self, codes: Tensor, scales: Tensor, geometry: Geometry, first: Tensor) -> None:
        super().__init__(codes, scales)  # type: ignore[safe-super]  # of the class beside this one
        self.geometry = geometry
        self.kernel_size = tuple(codes.shape[2:])


class RoundedConvForm(ConvForm):
    """Weights of a convolution for one kernel of rounded activations."""

    _flat = False
    _values_at_once = _VALUES_AT_ONCE

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of ``x`` ``[N, in, ...]`` float32 → ``[N, out, ...]`` float32, new memory."""
        layout = layout_of(x)
        x = x.contiguous(memory_format=layout)
        added = None if bias is None else per_channel(bias.float(), x.dim() + self._flat)
        sizes = output_sizes(tuple(x.shape[2:]), self.kernel_size, self.geometry)
        out = torch.empty(len(x), len(scales), *sizes, dtype=torch.float32, device=x.device, memory_format=layout)
        if not out.numel():
            return out
        at_once = max(1, self._values_at_once // x[0].numel())
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
        sums = self._of_integers(torch.div(self._used(x), step), method.digits, scales)
        if is_channels_last(sums) and not is_channels_last(out):
            for placed, into in zip(sums, out, strict=True):
                # torch copies a transposed matrix much faster than it reorders more dimensions
                into.flatten(1).copy_(placed.movedim(0, -1).flatten(0, -2).t())
            plus_bias(out.mul_(step), bias)
        else:
            plus_bias(torch.mul(sums, step, out=out), bias)

    def _used(self, x: Tensor) -> Tensor:
        """What of the input is convolved; a step is that of the whole sample."""
        return x

    @abstractmethod
    def _of_integers(self, numbers: Tensor, digits: int, scales: Tensor) -> Tensor:
        """The convolution of rounded ``numbers``, which is overwritten, times the scales: exact sums, rounded once."""


class PointwiseWeights(RoundedConvForm, BesideCodes):
    """The plain codes, for convolutions that are matrix products of channels."""

    bytes_a_weight = 0

    @override
    def _used(self, x: Tensor) -> Tensor:
        return strided(x, self.geometry.stride)

    @override
    def _of_integers(self, numbers: Tensor, digits: int, scales: Tensor) -> Tensor:
        codes = self.codes().flatten(1)
        samples, channels, *sizes = numbers.shape
        by_rows = is_channels_last(numbers)
        places = numbers[0, 0].numel()
        rows = numbers.flatten(2).transpose(1, 2) if by_rows or (samples > 1 and places < _PLACES_OF_A_SAMPLE) else None
        parts = []
        for digit in digits_of(numbers if rows is None else rows, digits, signed=True):
            if rows is not None:
                sums = torch._int_mm(digit.reshape(-1, channels), codes.t()).view(samples, places, -1)
                parts.append(sums.float().mul_(scales).transpose(1, 2))
            else:
                sums = torch.stack([torch._int_mm(codes, each) for each in digit.flatten(2)])
                parts.append(sums.float().mul_(scales[:, None]))
        return torch.unflatten(joined(parts), 2, sizes)


class Float32ConvCodes(RoundedConvForm, BesideCodes):
    """A float copy of the codes, for rounded activations.

    Sums of integers below 2²⁴ are exact, so that w8a8 gives the same bits as by any other kernel.
    """

    bytes_a_weight = 4

    def __init__(self, codes: Tensor, scales: Tensor, geometry: Geometry, first: Tensor) -> None:
        super().__init__(codes, scales, geometry, first)
        self._float_codes = codes.float().contiguous(memory_format=layout_of(first))

    @override
    def _of_integers(self, numbers: Tensor, digits: int, scales: Tensor) -> Tensor:
        out = convolve(numbers.round_(), self._float_codes, None, self.geometry)
        return out.mul_(per_channel(scales, out.dim()))


class WindowWeights(ConvForm, CodeHolder):
    """The codes as a linear layer's int8 kernel takes them, for few windows: each is a row, with a step of its own."""

    bytes_a_weight = 1

    def __init__(self, codes: Tensor, scales: Tensor, geometry: Geometry, first: Tensor) -> None:
        super().__init__(codes, scales, geometry, first)
        self._rows = OnednnWeights(codes.flatten(1), scales)

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
        return out if is_channels_last(x) else torch.empty(out.shape, dtype=out.dtype, device=out.device).copy_(out)

    @override
    def _unpacked(self) -> Tensor:
        return self._rows.codes().view(self.shape)


class FloatConvWeights(ConvForm, BesideCodes):
    """A float copy of the weights, for activations as they are.

    Attributes:
        weight: ``q * s``, of the shape of the codes, float32.
    """

    bytes_a_weight = 4

    def __init__(self, codes: Tensor, scales: Tensor, geometry: Geometry, first: Tensor) -> None:
        super().__init__(codes, scales, geometry, first)
        weight = dequantize(codes, scales, groups=geometry.transposed_groups)
        self.weight = weight.contiguous(memory_format=layout_of(first))

    @override
    def product(self, method: Method, x: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        return convolve(x, self.weight, None if bias is None else bias.float(), self.geometry)


def _steps(x: Tensor, steps: Tensor) -> Tensor:
    """As :func:`sample_steps`, with the same bits."""
    if len(x) * x[0].numel() < _FEW_VALUES:
        return sample_steps(x, steps)
    flat = x.permute(0, *range(2, x.dim()), 1).flatten(1) if is_channels_last(x) else x.flatten(1)
    return row_steps(flat, steps).view(-1, *[1] * (x.dim() - 1))


def joined(parts: list[Tensor]) -> Tensor:
    """The sums of all digits, lowest first, as those of numbers; the first is overwritten."""
    low, *higher = parts
    for place, part in enumerate(higher, 1):
        low.add_(part, alpha=256**place)
    return low
