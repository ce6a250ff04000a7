"""The quantized layer of each of torch's convolutions."""

from __future__ import annotations

from torch import nn

from tinyq_lightning.layers.conv import QuantizedConv

__all__ = [
    "CONVOLUTIONS",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedConvTranspose1d",
    "QuantizedConvTranspose2d",
    "QuantizedConvTranspose3d",
]


class QuantizedConv1d(QuantizedConv, nn.Conv1d):  # type: ignore[misc, override]
    """``nn.Conv1d`` with int8 weights."""


class QuantizedConv2d(QuantizedConv, nn.Conv2d):  # type: ignore[misc, override]
    """``nn.Conv2d`` with int8 weights."""


class QuantizedConv3d(QuantizedConv, nn.Conv3d):  # type: ignore[misc, override]
    """``nn.Conv3d`` with int8 weights."""


class QuantizedConvTranspose1d(QuantizedConv, nn.ConvTranspose1d):  # type: ignore[misc, override]
    """``nn.ConvTranspose1d`` with int8 weights and activations as they are."""


class QuantizedConvTranspose2d(QuantizedConv, nn.ConvTranspose2d):  # type: ignore[misc, override]
    """``nn.ConvTranspose2d`` with int8 weights and activations as they are."""


class QuantizedConvTranspose3d(QuantizedConv, nn.ConvTranspose3d):  # type: ignore[misc, override]
    """``nn.ConvTranspose3d`` with int8 weights and activations as they are."""


CONVOLUTIONS: dict[type[nn.Module], type[QuantizedConv]] = {
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.ConvTranspose3d: QuantizedConvTranspose3d,
}
"""The quantized layer of each of torch's convolutions."""
