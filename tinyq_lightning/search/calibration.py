"""Calibration: codes of four bits chosen with data, and kept only where the outputs of a layer have less error by them.

Codes of eight bits have a hundredth of their error, below what the rounding of activations adds, and are left. The
layers of the float model are watched while it runs over some batches, and the codes of each weight are chosen with the
second moments of what it is multiplied with (:mod:`~tinyq_lightning.kernels.error_feedback`). Scales and multipliers
stay. Where the products have a bias, the mean of their error is taken off that (Nagel et al., "Data-Free Quantization
Through Weight Equalization and Bias Correction", 2019). Both are judged by batches that were held out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tinyq_lightning.errors import ModelError
from tinyq_lightning.kernels import Moments, moments_bytes
from tinyq_lightning.layers import QuantizedLayer, kind_of
from tinyq_lightning.plan import Recoded, Swap
from tinyq_lightning.search.input_moments import APART, InputMoments, InputWatch
from tinyq_lightning.search.recoding import Member, recode

__all__ = [
    "MOMENTS_BYTES",
    "Combine",
    "Read",
    "calibrate",
    "layers_of_no_use",
    "passes_over_data",
    "why_of_no_use",
]

MOMENTS_BYTES = 512 * 2**20
"""Memory for the moments of a pass over the data, unless those of one layer, or of layers that share a weight, take
more. Layers whose moments do not fit are watched in another pass."""


Read = Callable[[Callable[[], None]], None]
"""Runs the float model over the same batches, each time that it is called; it calls what it is given before each."""


Combine = Callable[[Tensor], object]
"""Adds the tensors of other processes to one, in place."""


def calibrate(swap: Swap, read: Read, combine: Combine | None = None) -> dict[str, Recoded]:
    """Codes and biases chosen with data for the layers of a swap, to be given to its ``recoded``. Nothing is changed.

    The same data gives the same codes on the same machine. Layers that share a weight are calibrated together.

    Args:
        swap: out of the model.
        read: runs the model, in each of a few passes over the data; see :func:`passes_over_data`.
        combine: with several processes, each with data of its own, what makes their sums one; None for one process.

    Returns:
        What was found for each layer, by its name.

    Raises:
        ModelError: there is no batch.
    """
    found: dict[str, Recoded] = {}
    groups = _groups(swap, found)
    for some in _passes(swap, groups):
        watch = InputWatch(swap, [name for group in some for name in group])
        with swap.opened(), watch.watching():
            read(watch.next_batch)
        if not watch.batches:
            raise ModelError("calibration: there is no batch: give at least one")
        if combine is not None:
            _combine(watch, combine)
        for group in some:
            found |= _recoded(swap, group, watch)
    return found


def why_of_no_use(swap: Swap, found: Mapping[str, Recoded]) -> str | None:
    """Why data was of no use to any layer whose kind can be calibrated; None if it was to one, or there are none."""
    reasons = set(_reasons(swap, found).values())
    return None if None in reasons or not reasons else "; ".join(sorted(map(str, reasons)))


def layers_of_no_use(swap: Swap, found: Mapping[str, Recoded]) -> dict[str, str]:
    """The layers whose kind can be calibrated but whose data could not be used, with the reasons.

    Those that the data did not reach are left out: a model need not use all its layers on any data.
    """
    return {name: why for name, why in _reasons(swap, found).items() if why and not why.endswith(_NOT_CALLED)}


def _reasons(swap: Swap, found: Mapping[str, Recoded]) -> dict[str, str | None]:
    """Why each layer whose kind can be calibrated was not; None if it was."""
    return {name: found[name].uncalibrated for group in _groups(swap, {}) for name in group}


def passes_over_data(swap: Swap) -> int:
    """How often :func:`calibrate` reads the data."""
    return len(_passes(swap, _groups(swap, {})))


_NOT_CALLED = "the data did not reach it"


def _groups(swap: Swap, found: dict[str, Recoded]) -> list[list[str]]:
    """The names of the layers to calibrate, those that share a weight together; why the others are not is noted."""
    layers = {name: layer for name, _, layer in swap.pairs() if layer.bits == 4}
    ties, groups, seen = swap.ties(), list[list[str]](), set[str]()
    for name in layers:
        if name in seen:
            continue
        group = [name, *(other for other in ties[name] if other in layers)]
        seen.update(group)
        why = {each: _why_not(layers[each]) for each in group}
        others = {each: reason for each, reason in why.items() if reason}
        if not others:
            groups.append(group)
        for each in group if others else ():
            partner = next(iter(others))
            found[each] = Recoded(uncalibrated=why[each] or f"tied to {partner}: {others[partner]}")
    return groups


def _why_not(layer: QuantizedLayer) -> str | None:
    kind = kind_of(layer)
    return "its kind is not known" if kind is None else kind.why_uncalibrated


def _passes(swap: Swap, groups: Sequence[Sequence[str]]) -> list[list[Sequence[str]]]:
    """The groups in the order of the model, as many together as the memory for their moments allows."""
    apart = dict(swap.joint_projections())
    sizes = {name: (APART if name in apart else 1) * _moments_size(layer) for name, _, layer in swap.pairs()}
    passes: list[list[Sequence[str]]] = []
    held = 0
    for group in groups:
        needed = sum(sizes[name] for name in group)
        if not passes or held + needed > MOMENTS_BYTES:
            passes.append([])
            held = 0
        passes[-1].append(group)
        held += needed
    return passes


def _moments_size(layer: QuantizedLayer) -> int:
    """Bytes for the moments of a layer, both of those to choose by and of those held out."""
    kind = kind_of(layer)
    if kind is None or kind.why_uncalibrated:
        return 0
    return sum(2 * moments_bytes(kind.row_parts(layer), size.columns) for size in kind.sizes(layer).values())


def _combine(watch: InputWatch, combine: Combine) -> None:
    """Have the sums of all processes in each; a layer may have been called in some of them only."""
    layers = [each for weights in watch.layers.values() for each in weights.values()]
    state = torch.tensor(
        [[each.chosen_by is not None, each.taken_apart, bool(each.failure)] for each in layers]
    ).double()
    combine(state)
    for (called, apart, failed), each in zip(state.tolist(), layers, strict=True):
        if failed:
            each.failure = each.failure or "a call in another process could not be summed up"
        if called:
            if apart:
                each.take_apart()
            else:
                each.in_parts(each.parts)
            for moments in (each.chosen_by, each.held_out):
                assert moments is not None
                for tensor in moments.tensors():
                    combine(tensor)


def _recoded(swap: Swap, group: Sequence[str], watch: InputWatch) -> dict[str, Recoded]:
    """What was found for layers that share a weight; the moments are let go."""
    moments = {name: watch.layers.pop(name) for name in group}
    why = {name: next(filter(None, map(_why_not_by, moments[name].values())), None) for name in group}
    failed = next((name for name in group if why[name]), None)
    if failed is not None:
        return {name: Recoded(uncalibrated=why[name] or f"tied to {failed}: {why[failed]}") for name in group}
    pairs = {name: (module, layer) for name, module, layer in swap.pairs()}
    both = {name: {weight: _both(each) for weight, each in moments[name].items()} for name in group}
    return recode([Member(name, *pairs[name], both[name]) for name in group])


def _why_not_by(moments: InputMoments) -> str | None:
    """Why a layer is not calibrated by what was summed up, or None."""
    if moments.failure:
        return moments.failure
    if moments.chosen_by is None or moments.chosen_by.is_empty:
        return _NOT_CALLED
    if not all(each.is_finite for each in _both(moments)):
        return "its inputs are NaN or infinite, or so large that their squares are"
    return "no input of it was in a batch that was held out: give more batches" if _both(moments)[1].is_empty else None


def _both(moments: InputMoments) -> tuple[Moments, Moments]:
    assert moments.chosen_by is not None
    assert moments.held_out is not None
    return moments.chosen_by, moments.held_out
