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

    torch_class = nn.Conv1d


class QuantizedConv2d(QuantizedConv, nn.Conv2d):  # type: ignore[misc, override]
    """``nn.Conv2d`` with int8 weights."""

    torch_class = nn.Conv2d


class QuantizedConv3d(QuantizedConv, nn.Conv3d):  # type: ignore[misc, override]
    """``nn.Conv3d`` with int8 weights."""

    torch_class = nn.Conv3d


class QuantizedConvTranspose1d(QuantizedConv, nn.ConvTranspose1d):  # type: ignore[misc, override]
    """``nn.ConvTranspose1d`` with int8 weights and activations as they are."""

    torch_class = nn.ConvTranspose1d


class QuantizedConvTranspose2d(QuantizedConv, nn.ConvTranspose2d):  # type: ignore[misc, override]
    """``nn.ConvTranspose2d`` with int8 weights and activations as they are."""

    torch_class = nn.ConvTranspose2d


class QuantizedConvTranspose3d(QuantizedConv, nn.ConvTranspose3d):  # type: ignore[misc, override]
    """``nn.ConvTranspose3d`` with int8 weights and activations as they are."""

    torch_class = nn.ConvTranspose3d


CONVOLUTIONS: dict[type[nn.Module], type[QuantizedConv]] = {
    layer.torch_class: layer
    for layer in (
        QuantizedConv1d,
        QuantizedConv2d,
        QuantizedConv3d,
        QuantizedConvTranspose1d,
        QuantizedConvTranspose2d,
        QuantizedConvTranspose3d,
    )
}
"""The quantized layer of each of torch's convolutions."""
