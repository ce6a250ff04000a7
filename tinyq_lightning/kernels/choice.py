"""Which kernel a layer takes on this machine, and why: asks the list of kernels in order."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, MutableMapping
from weakref import WeakValueDictionary

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tinyq_lightning.errors import SpecError
from tinyq_lightning.kernels.base import Choice, Kernel, LayerShape, WeightForm, with_memory
from tinyq_lightning.kernels.float16 import FLOAT16
from tinyq_lightning.kernels.float32 import FLOAT32
from tinyq_lightning.kernels.formula import FORMULA
from tinyq_lightning.kernels.int4 import INT4
from tinyq_lightning.kernels.int8 import INT8
from tinyq_lightning.kernels.tracing import outside_modes
from tinyq_lightning.methods import KERNELS, KernelName, Method

__all__ = [
    "FORMS",
    "KERNEL_LIST",
    "Choice",
    "choose_kernel",
    "wanted_kernel",
    "weight_form",
]

KERNEL_LIST: tuple[Kernel, ...] = (INT4, INT8, FLOAT16, FLOAT32, FORMULA)
"""All kernels, in the order in which they are asked; the last runs every layer on every device."""


FORMS: dict[str, type[WeightForm]] = {name: form for kernel in KERNEL_LIST for name, form in kernel.forms.items()}
"""The form of the weights that each variant of a kernel takes; variants without one take the plain codes."""


def choose_kernel(
    kernel: KernelName, method: Method, out_features: int, in_features: int, device: str = "cpu"
) -> Choice:
    """Which kernel a float32, float16 or bfloat16 input takes on a device. Anything else takes the formula.

    The environment's ``TINYQ_KERNEL`` goes before what was asked for. It may be ``auto``, ``compact``, ``int8`` or
    ``reference``, and ``float16`` or ``float32`` to compare them.

    Args:
        kernel: what was asked for.
        method: of the layer.
        out_features: of the layer.
        in_features: of the layer.
        device: the type of device, as in ``torch.device(...).type``.

    Raises:
        SpecError: ``TINYQ_KERNEL`` is something else.
    """
    return with_memory(_choose(wanted_kernel(kernel), method, out_features, in_features, device), FORMS)


def _choose(wanted: str, method: Method, out_features: int, in_features: int, device: str) -> Choice:
    layer = LayerShape(method, out_features, in_features, wanted == "compact", device)
    if wanted != "reference" and not layer.weights:
        return Choice("reference", "no weights")
    lacking = ""
    for each in KERNEL_LIST:
        if wanted not in ("auto", "compact", each.name):
            continue
        reason = each.lacks(layer) if each.devices is None or device in each.devices else f"it does not run on {device}"
        if wanted == each.name:
            return Choice(each.instead, reason) if reason else Choice(each.variant(layer), "as asked for")
        if reason:
            lacking = lacking or reason
        elif choice := each.fastest(layer, lacking):
            return choice
    raise AssertionError("the last kernel of the list runs every layer")


def wanted_kernel(kernel: KernelName) -> str:
    """What the environment's ``TINYQ_KERNEL`` asks for, or else ``kernel``.

    Raises:
        SpecError: ``TINYQ_KERNEL`` names no kernel.
    """
    asked = os.environ.get("TINYQ_KERNEL", "")
    allowed = (*KERNELS, *(each.name for each in KERNEL_LIST if each.name not in KERNELS))
    if asked and asked not in allowed:
        raise SpecError(f"the environment variable TINYQ_KERNEL is {asked!r}: it must be one of {', '.join(allowed)}")
    return asked or kernel


# Layers that share codes share the forms made from them.
_made: MutableMapping[Tensor, WeakValueDictionary[str, WeightForm]] = WeakTensorKeyDictionary()


_making = threading.Lock()


def weight_form(
    kernel: str, codes: Tensor, scales: Tensor, make: Callable[[Tensor, Tensor], WeightForm] | None = None
) -> WeightForm:
    """The form that ``kernel`` takes, made from codes ``[out, in, ...]`` int8 and scales ``[out]`` float32.

    Args:
        kernel: its name; with ``make`` any name for what that makes.
        codes: of the layer.
        scales: of the layer.
        make: makes the form; None for what the kernels of linear layers take.
    """
    with _making:
        known = _made.setdefault(codes, WeakValueDictionary())
        form = known.get(kernel)
        if form is None or not form.is_current(codes, scales):
            with outside_modes():
                form = known[kernel] = (make or FORMS[kernel])(codes, scales)
        return form
