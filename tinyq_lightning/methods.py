"""The methods: how finely each holds its activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "FORMAT_NAMES",
    "KERNELS",
    "KIND_NAMES",
    "METHODS",
    "KernelName",
    "Method",
]


@dataclass(frozen=True)
class Method:
    """How one method holds its activations.

    Attributes:
        name: as users write it.
        steps: largest whole number of the activations' fixed point.
        digits: how many int8 digits of base 256 hold such a number.
        rounds: whether activations are rounded to whole steps: by every kernel, or by none. One that multiplies in
            floating point could do without, but what was measured in one batch, on one processor, is to hold in any
            other.
    """

    name: str
    steps: int
    digits: int
    rounds: bool = True


METHODS = {
    method.name: method
    for method in (
        Method("w8a32", 127 * 256 * 256, digits=3, rounds=False),
        Method("w8a16", 127 * 256, digits=2),
        Method("w8a8", 127, digits=1),
    )
}


KernelName = Literal["auto", "compact", "int8", "reference"]


KERNELS: tuple[KernelName, ...] = ("auto", "compact", "int8", "reference")
"""What users ask for: the fastest; the fastest of those that hold one byte a weight; the same bits for any batch and
number of threads; the textbook formula."""


KIND_NAMES = ("linear", "attention", "conv", "embedding", "recurrent")
"""The kinds of layer that are quantized unless a spec names fewer."""


FORMAT_NAMES = {
    "pt2": "a program of torch.export, which runs in Python with torch alone",
    "aoti": "an AOTInductor package: machine code of this processor, for C++ and Python; needs a C++ compiler",
    "onnx": "a graph of standard operators, for ONNX Runtime and others",
    "openvino": "OpenVINO's own files, for processors and accelerators of Intel",
    "safetensors": "the tensors, for other languages, and back without a loss",
    "compressed-tensors": "a folder of a Hugging Face model, which from_pretrained reads",
    "ckpt": "a Lightning checkpoint",
}
"""The formats that a model is exported in, each in a line. They are here, since the command line's help tells them
without importing torch; :data:`tinyq_lightning.handover.FORMATS` has what writes and runs each."""
