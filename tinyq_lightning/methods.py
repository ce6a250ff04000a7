"""The methods: how many bits each has for a weight, and how finely it holds activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = [
    "ACTIVATIONS",
    "FORMAT_NAMES",
    "KERNELS",
    "KIND_NAMES",
    "LADDER",
    "METHODS",
    "STATIC_FORMATS",
    "TENSOR_FORMATS",
    "Activations",
    "KernelName",
    "Method",
    "with_bits",
]


@dataclass(frozen=True)
class Method:
    """How one method holds weights and activations.

    Attributes:
        name: as users write it.
        steps: largest whole number of the activations' fixed point.
        digits: how many int8 digits of base 256 hold such a number.
        rounds: whether activations are rounded to whole steps: by every kernel, or by none. One that multiplies in
            floating point could do without, but what was measured in one batch, on one processor, is to hold in any
            other.
        bits: of a weight's code: 8, or 4 with a multiplier for each group of weights.
    """

    name: str
    steps: int
    digits: int
    rounds: bool = True
    bits: int = 8


METHODS = {
    method.name: method
    for method in (
        Method("w8a32", 127 * 256 * 256, digits=3, rounds=False),
        Method("w8a16", 127 * 256, digits=2),
        Method("w8a8", 127, digits=1),
        Method("w4a32", 127 * 256 * 256, digits=3, rounds=False, bits=4),
        Method("w4a16", 127 * 256, digits=2, bits=4),
        Method("w4a8", 127, digits=1, bits=4),
    )
}


LADDER = ("w4a8", "w4a16", "w4a32", "w8a8", "w8a16", "w8a32", "float")
"""The methods by the bytes of a weight, then by how finely they hold activations: the way up of a budget's search."""


def with_bits(method: str, bits: int) -> str:
    """The method that holds activations as ``method`` does, and weights in so many bits: ``w8a16`` → ``w4a16``."""
    return f"w{bits}a{method.partition('a')[2]}"


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


STATIC_FORMATS = ("onnx", "openvino")
"""Those that can hold ranges of activations."""


TENSOR_FORMATS = ("safetensors", "ckpt")
"""Those that hold tensors alone and do not run."""


Activations = Literal["dynamic", "static", "static-signed"]
"""How what is exported rounds activations: as they come; by ranges to uint8; by ranges to int8 with zero point 0."""


ACTIVATIONS: tuple[str, ...] = get_args(Activations)
