"""Quantized forward pass functions, and the choice among kernels.

Each method is one function of ``(input, int8_weights, scales, bias)``. They differ only in how finely
the activations are held; weights are int8 with one float32 scale per output row in all of them:

====== ===================== =========================================================
method activations           formula (``q`` int8 weights, ``s`` their scales)
====== ===================== =========================================================
w8a32  32-bit, as they are   ``(x @ qᵀ) * s + bias``
w8a16  16-bit per token      ``(round(x / a) @ qᵀ) * a * s + bias``, ``a = max|x| / 32512``
w8a8   8-bit per token       ``(round(x / a) @ qᵀ) * a * s + bias``, ``a = max|x| / 127``
====== ===================== =========================================================

:mod:`.reference` is the formula itself, for any device and dtype. On the CPU a layer may pack its weights,
once, for the kernel that :func:`choose_kernel` names; :func:`packed_linear` multiplies them. Every kernel
rounds the activations as the formula does: they differ in the last bits of float32 sums.
"""

from tinyq_lightning.forward.choice import KERNELS, Choice, Implementation, KernelName, choose_kernel
from tinyq_lightning.forward.methods import METHODS, Method
from tinyq_lightning.forward.packed import FORMS, CodeHolder, WeightForm, weight_form
from tinyq_lightning.forward.packed_linear import INPUT_DTYPES, packed_linear
from tinyq_lightning.forward.reference import quantized_linear, w8_a8_forward, w8_a16_forward, w8_a32_forward

__all__ = [
    "FORMS",
    "INPUT_DTYPES",
    "KERNELS",
    "METHODS",
    "Choice",
    "CodeHolder",
    "Implementation",
    "KernelName",
    "Method",
    "WeightForm",
    "choose_kernel",
    "packed_linear",
    "quantized_linear",
    "w8_a8_forward",
    "w8_a16_forward",
    "w8_a32_forward",
    "weight_form",
]
