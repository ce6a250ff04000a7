"""``quantize`` with data to choose codes by, outside of Lightning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from tinyq_lightning.errors import ModelError, SpecError, quoted
from tinyq_lightning.plan import (
    Plan,
    Swap,
    quantize_by_layer,
    refuse_save_pretrained,
    return_freed_memory,
    warn_of_unkept,
)
from tinyq_lightning.search.calibration import calibrate, layers_of_no_use, passes_over_data, why_of_no_use
from tinyq_lightning.search.timer import evaluating
from tinyq_lightning.spec import SpecLike, as_spec

__all__ = [
    "is_one_input",
    "quantize",
]


def quantize(model: nn.Module, spec: SpecLike = "w8a32", calibration: Iterable[Any] | None = None) -> Plan:
    """Quantize the layers of any ``nn.Module`` that are of the spec's kinds, in place.

    All is checked first: if the spec or a weight is refused, nothing is changed. Then layers are replaced one at a
    time, smallest first: peak memory is the float model plus one layer's codes. Layers that share a weight, and the
    projections of one attention, are replaced together. After an interruption each layer is either float or
    quantized; call quantize again to finish.

    With ``calibration``, codes of four bits are chosen by what they do to the outputs of layers on that data, see
    :mod:`tinyq_lightning.search.calibration`. The float model runs on it in eval mode; the data is not kept. Layers
    are replaced when all codes are chosen: peak memory is the float model, all codes, and the moments of the inputs,
    :data:`~tinyq_lightning.search.calibration.MOMENTS_BYTES` or those of the largest layer.

    Args:
        model: any module with layers of a known kind somewhere below it.
        spec: a method name, a path to YAML, a mapping, or a ``QuantizationSpec``.
        calibration: inputs of the model: each a tensor, a tuple of arguments, or a dict of arguments by name. All of
            them are used, or as many as the spec's ``calibrate`` says. Where moments do not fit in memory at once, it
            is read again, so it must not be an iterator then.

    A warning names the layers whose inputs could not be used, such as those that are not finite; they have the codes
    that they have without data.

    Returns:
        The plan that was carried out.

    Raises:
        SpecError: the spec is wrong or does not fit the model, or has no method of four bits for the data.
        ModelError: the model is itself a layer, a weight cannot be quantized, or the data cannot be used: it is empty,
            the model refuses it, or it is of no use to any layer: it reaches none, or its values are not finite.
    """
    asked = as_spec(spec)
    if calibration is None:
        return quantize_by_layer(model, asked)
    _refuse_one_input(calibration)
    if not asked.has_four_bits:
        raise SpecError(
            f"{asked.origin.where()}: calibration chooses codes of four bits, and no method here has four: ask for "
            "w4a32, w4a16 or w4a8, or leave calibration out"
        )
    warn_of_unkept(asked, 3, calibrated=True)
    swap = Swap(model, asked)
    passes = passes_over_data(swap)
    if passes > 1 and isinstance(calibration, Iterator):
        raise ModelError(
            f"calibration: the moments of this model's inputs take {passes} passes over the data, and an iterator can "
            "be read once: give a list, a DataLoader, or something else that begins anew"
        )
    limit = asked.calibrate.batches if asked.calibrate else None

    def read(next_batch: Callable[[], None]) -> None:
        with evaluating(model), torch.no_grad():
            for index, item in enumerate(islice(calibration, limit)):
                next_batch()
                _call(model, item, index)

    found = calibrate(swap, read)
    if why := why_of_no_use(swap, found):
        raise ModelError(
            f"calibration: the data is of no use to any layer ({why}): give inputs that run the model as it will be "
            "used and its values finite, or leave calibration out"
        )
    if left := layers_of_no_use(swap, found):
        told = "; ".join(f"{name}: {why}" for name, why in left.items())
        warnings.warn(f"calibration: codes of these layers were chosen without the data: {told}", stacklevel=2)
    swap = swap.recoded(found)
    try:
        swap.put_in()
    except BaseException:
        swap.take_out()
        raise
    plan = swap.plan
    del swap
    return_freed_memory()
    refuse_save_pretrained(model)
    return plan


def is_one_input(calibration: object) -> bool:
    """Whether this is one input, or none, where an iterable of inputs is wanted."""
    return isinstance(calibration, Tensor | Mapping | str) or not isinstance(calibration, Iterable)


def _refuse_one_input(calibration: object) -> None:
    if is_one_input(calibration):
        raise ModelError(
            f"calibration must be several inputs, such as a list, not a {type(calibration).__name__}: write "
            "calibration=[x] for a single one"
        )


def _call(model: nn.Module, item: Any, index: int) -> None:
    """Run the model on an input; what it returns is not needed."""
    try:
        if isinstance(item, Mapping):
            model(**item)
        elif isinstance(item, tuple | list):
            model(*item)
        else:
            model(item)
    except Exception as error:
        raise ModelError(
            f"calibration: {type(model).__name__} failed on input {index}, a {type(item).__name__} "
            f"({quoted(error)}). Each input is a tensor, a tuple of arguments, or a dict of arguments "
            "by name, without labels"
        ) from error
