"""Which kernel a convolution takes on this machine, and its forward pass over the form of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from tinyq_lightning.kernels.base import LONGEST_SUM, Choice, with_memory
from tinyq_lightning.kernels.choice import wanted_kernel
from tinyq_lightning.kernels.conv_forms import (
    ConvForm,
    Float32ConvCodes,
    FloatConvWeights,
    PointwiseWeights,
    WindowWeights,
)
from tinyq_lightning.kernels.conv_int4 import ConvNibbles
from tinyq_lightning.kernels.conv_onednn import (
    Int8ApartWeights,
    Int8ConvWeights,
    Int8GroupedWeights,
    convolves_any_geometry,
    has_int8_convolution,
)
from tinyq_lightning.kernels.convolution import Geometry, StraightConvolution, quantized_convolution
from tinyq_lightning.kernels.integer import has_plain_product, takes_integers
from tinyq_lightning.kernels.onednn import has_onednn_product
from tinyq_lightning.kernels.probe import has_amx
from tinyq_lightning.methods import KernelName, Method

__all__ = [
    "CONV_FORMS",
    "ConvShape",
    "choose_convolution",
    "convolve_once",
    "packed_convolution",
]


CONV_FORMS: dict[str, type[ConvForm]] = {
    "int8-onednn": Int8ConvWeights,
    "int8-grouped": Int8GroupedWeights,
    "int8-apart": Int8ApartWeights,
    "int8": PointwiseWeights,
    "windows": WindowWeights,
    "float32": FloatConvWeights,
    "float32x1": Float32ConvCodes,
    "int4": ConvNibbles,
}
"""The form of the weights that each kernel of convolutions takes; others take the plain codes."""


# Float weights of fewer than so many weights are kept beside the codes.
_KEPT_TO = 1_000_000


# The same where few windows are no rows of a linear kernel, so that nothing else spares their weights' expansion.
_KEPT_WITHOUT_ROWS_TO = 4_000_000


# With fewer windows, to rebuild the float weights costs more than to convolve by them.
_FEW_WINDOWS = 257


# In several groups oneDNN's int8 convolution returns wrong numbers (oneDNN 3.12) from one input channel to more than
# _FROM_ONE_CHANNEL outputs each, and where outputs are more than a block and fill none, of codes that it lays out anew
# for another input. With AMX groups of one output each are all that it is trusted with.
_FROM_ONE_CHANNEL = 32
_BLOCK = 64


# Such groups are convolved one after the other. Of fewer weights each, the calls take longer than they win.
_APART_FROM = 16_384


# With a sum of fewer products to an output, rounding costs more than an int8 convolution wins.
_PAYS_FROM = 32


@dataclass(frozen=True)
class ConvShape:
    """What the choice among kernels depends on.

    Attributes:
        in_channels: of the layer.
        out_channels: of the layer.
        summed: how many products are summed to an output.
        pointwise: whether it is a matrix product of channels.
        dims: how many it has, without samples and channels.
        groups: of channels.
        transposed: whether it is a transposed convolution.
        usual: whether it moves as those of most networks do: alike in at most two dimensions, with a kernel of odd
            width, a stride of one or two places and no dilation.
    """

    in_channels: int
    out_channels: int
    summed: int
    pointwise: bool
    dims: int = 2
    groups: int = 1
    transposed: bool = False
    usual: bool = True

    @property
    def weights(self) -> int:
        """How many weights the layer has."""
        return self.out_channels * self.summed


def choose_convolution(kernel: KernelName, method: Method, shape: ConvShape, device: str = "cpu") -> Choice:
    """Which kernel a float32, float16 or bfloat16 input takes on a device. Anything else takes the formula.

    ``TINYQ_KERNEL`` in the environment goes before what was asked for, as for linear layers.

    Args:
        kernel: what was asked for.
        method: of the layer.
        shape: of the layer.
        device: the type of device.

    Raises:
        SpecError: ``TINYQ_KERNEL`` is none of the kernels.
    """
    return with_memory(_choose(wanted_kernel(kernel), method, shape, device), CONV_FORMS)


def _choose(wanted: str, method: Method, shape: ConvShape, device: str) -> Choice:
    if wanted == "reference":
        return Choice("reference", "as asked for")
    if method.bits == 4 and wanted in ("compact", "int4"):
        return Choice("int4", "half a byte a weight, expanded on each call")
    return _choose_for_codes(wanted, method, shape, device)


def _choose_for_codes(wanted: str, method: Method, shape: ConvShape, device: str) -> Choice:
    if device == "cuda":
        return _on_gpu(wanted, method, shape)
    lacking = _why_no_int8(shape, device)
    if wanted == "int8":
        if shape.transposed or lacking:
            return Choice("exact", lacking or "transposed convolutions have no int8 kernel")
        return Choice(_int8_variant(shape), "as asked for")
    if device != "cpu":
        return Choice("reference", f"no other kernel for {device}")
    compact = wanted == "compact"
    if not method.rounds:
        return _without_rounding(shape, compact)
    if not lacking and (compact or shape.summed >= _PAYS_FROM):
        return Choice(_int8_variant(shape), "the processor has int8 products")
    why = lacking or f"sums of {shape.summed} are too short for int8 to pay"
    keeps = not compact and shape.weights < _KEPT_TO
    return Choice("float32x1" if keeps else "reference", f"integers in floating point: {why}")


def _on_gpu(wanted: str, method: Method, shape: ConvShape) -> Choice:
    windows = shape.groups == 1 and not shape.transposed
    if (method.rounds or wanted == "int8") and windows and takes_integers(shape.summed, "cuda"):
        return Choice("int8-cuda", "the GPU has int8 products, which take windows as rows")
    if wanted == "int8" or method.rounds:
        reason = (
            "no exact int8 product on this GPU" if windows else "int8 products take no groups and no transposed ones"
        )
        return Choice("exact" if wanted == "int8" else "reference", f"integers in float64: {reason}")
    return Choice("reference", "one byte a weight in memory, expanded on each call")


def convolve_once(
    shape: ConvShape,
    method: Method,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """A convolution by codes that are used once, by the kernel that ``compact`` has for codes of eight bits.

    Args:
        shape: of the layer.
        method: how finely activations are held.
        x: ``[N, in, ...]`` float32.
        codes: int8 in the shape of the weight.
        scales: ``[out]`` float32.
        bias: ``[out]`` floating, or None.
        geometry: how the convolution moves over its input.

    Returns:
        ``[N, out, ...]`` float32.
    """
    kernel = _choose_for_codes("compact", method, shape, x.device.type).kernel
    if kernel in CONV_FORMS:
        return CONV_FORMS[kernel](codes, scales, geometry, x).product(method, x, scales, bias)
    return quantized_convolution(
        method, "integer" if kernel == "int8-cuda" else "reference", x, codes, scales, bias, geometry
    )


def _without_rounding(shape: ConvShape, compact: bool) -> Choice:
    unfolds = shape.groups == 1 and not shape.transposed and shape.dims < 3 and shape.summed <= LONGEST_SUM
    if not compact and shape.weights < (_KEPT_TO if unfolds else _KEPT_WITHOUT_ROWS_TO):
        return Choice("float32", "a float copy in memory, as fast as float; the file stays small")
    reason = "one byte a weight in memory; float weights are rebuilt on each call, some percent of its time"
    if unfolds and has_amx() and not shape.pointwise and not _why_no_int8(shape, "cpu"):
        # Measured on one thread, 1 to 1,568 windows: 1.0 to 3.7 of the float layer; the other ways 0.2 to 1.5.
        return Choice(_int8_variant(shape), "activations in three int8 digits, which tiles multiply faster than floats")
    if unfolds and has_onednn_product():
        return Choice("reference", reason, few_rows=_FEW_WINDOWS, few="windows")
    return Choice("reference", reason)


def _why_no_int8(shape: ConvShape, device: str) -> str:
    if device != "cpu":
        return f"it does not run on {device}"
    if shape.summed > LONGEST_SUM:
        return f"sums of {shape.summed:,} products can overflow int32"
    if shape.pointwise and has_plain_product():
        return ""
    if not has_int8_convolution():
        return "no fast and exact int8 convolution here"
    if not shape.usual and not convolves_any_geometry():
        return "no exact int8 convolution that moves so on this processor"
    if _strays(shape) and shape.weights < _APART_FROM * shape.groups:
        channels, outputs = shape.in_channels // shape.groups, shape.out_channels // shape.groups
        return f"no exact int8 convolution of groups of {channels} to {outputs} channels"
    return ""


def _strays(shape: ConvShape) -> bool:
    """Whether an int8 convolution of all groups in one call would return wrong numbers."""
    if shape.groups == 1:
        return False
    outputs = shape.out_channels // shape.groups
    if not convolves_any_geometry():
        return outputs > 1
    if shape.in_channels == shape.groups:
        return outputs > _FROM_ONE_CHANNEL
    return outputs > _BLOCK and outputs % _BLOCK > 0


def _int8_variant(shape: ConvShape) -> str:
    if _strays(shape):
        return "int8-apart"
    if shape.pointwise and has_plain_product():
        return "int8"
    return "int8-onednn" if shape.groups == 1 else "int8-grouped"


def packed_convolution(method: Method, form: ConvForm, input: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """As :func:`~tinyq_lightning.kernels.convolution.quantized_convolution`, by the kernel that the form is made for.

    Args:
        method: how finely activations are held.
        form: the weights.
        input: ``[N, in, ...]`` float32, float16 or bfloat16, on the form's device.
        scales: ``[out]`` float32.
        bias: ``[out]`` floating, or None.

    Returns:
        ``[N, out, ...]`` of the input's dtype, or autocast's; computed in float32.
    """
    device = input.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            out = packed_convolution(method, form, input.float(), scales, bias)
        return out.to(torch.get_autocast_dtype(device))
    x = input.float()
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        straight = StraightConvolution.apply(  # type: ignore[no-untyped-call]
            x, bias, form, scales, form.geometry, _product, method
        )
        out = cast(Tensor, straight)
    else:
        out = form.product(method, x, scales, bias)
    return out.to(input.dtype)


def _product(x: Tensor, bias: Tensor | None, form: ConvForm, scales: Tensor, _: object, method: Method) -> Tensor:
    return form.product(method, x, scales, bias)
