"""Puts empty quantized layers into a float module, as the plan of a quantized checkpoint has them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from tinyq_lightning.errors import CheckpointError, TrainerError
from tinyq_lightning.file.checkpoint import check_digests
from tinyq_lightning.file.codes import CODES, columns_of
from tinyq_lightning.file.validate import check_format, check_layers, find_codes, prefixes_of_codes
from tinyq_lightning.kernels import packed_shapes
from tinyq_lightning.layers import QuantizedLayer
from tinyq_lightning.methods import METHODS
from tinyq_lightning.plan import Site, carry_over, find_sites

__all__ = [
    "fill_what_is_still_held",
    "prepare_structure",
    "refuse_resuming",
    "restore_structure",
]

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def restore_structure(
    module: nn.Module, trainer: Trainer | None, checkpoint: Mapping[str, Any], source: str
) -> list[tuple[Site, QuantizedLayer]]:
    """Check a quantized checkpoint that a Trainer restores into a module, and put its empty layers into the module.

    Args:
        module: float.
        trainer: the Trainer, if there is one.
        checkpoint: quantized.
        source: its name, for errors.

    Returns:
        The float layers, each with the layer that took its place.

    Raises:
        TrainerError: the Trainer is fitting.
        CheckpointError: the checkpoint is damaged or does not fit the module.
    """
    refuse_resuming(trainer, source)
    check_format(checkpoint, source)
    check_digests(checkpoint, source, only=("state_dict", "tinyq"))
    check_layers(checkpoint, source)
    return prepare_structure(module, checkpoint, source)


def prepare_structure(
    module: nn.Module, checkpoint: Mapping[str, Any], source: str = "the checkpoint"
) -> list[tuple[Site, QuantizedLayer]]:
    """Put empty quantized layers where the plan of the checkpoint has them; ``load_state_dict`` then fills them.

    Args:
        module: freshly built, float.
        checkpoint: a quantized checkpoint.
        source: its name, for errors.

    Returns:
        The float layers, each with the layer that took its place.

    Raises:
        CheckpointError: the module has no such layer, or one of another shape.
    """
    entries = [entry for entry in checkpoint["tinyq"]["plan"] if entry["method"] != "float"]
    _materialize(module, entries, checkpoint["state_dict"])
    found = find_sites(module, {entry["name"] for entry in entries}.__contains__)
    sites = {name: site for site in found for name in site.names}
    made: dict[str, tuple[Site, QuantizedLayer]] = {}
    state = checkpoint["state_dict"]
    prefixes = prefixes_of_codes(state)
    for entry in entries:
        name = entry["name"]
        site = sites.get(name)
        if site is None:
            raise CheckpointError(
                f"{source} has the quantized layer {name!r}, {type(module).__name__} has no layer of that name. "
                f"It has: {', '.join(sorted(sites)) or 'none'}{_hint(name, sites)}"
            )
        if site.is_quantized:
            continue
        for weight, here in site.weights_like.items():
            names = [f"{each}.{weight}" for each in site.names] if len(site.weights) > 1 else site.names
            prefix = next(iter(find_codes(prefixes, names)), None)
            bits = METHODS[entry["method"]].bits
            codes = None if prefix is None else state[f"{prefix}{CODES[bits]}"]
            size = site.kind.size_with(site.sizes[weight], 0 if codes is None else len(codes))
            wanted = here.shape if bits == 8 else packed_shapes(size.rows, size.columns)[0]
            if codes is not None and codes.shape != wanted:
                packed = " packed" if bits == 4 else ""
                raise CheckpointError(
                    f"layer {name!r} is{packed} {list(codes.shape)} in {source} and {list(wanted)} in "
                    f"{type(module).__name__}: build it with the arguments it was trained with"
                )
        kernel = checkpoint["tinyq"]["spec"].get("kernel", "auto")
        layer = site.kind.make_empty(site.module, entry["method"], kernel)
        carry_over(site, layer)
        shared = made.get(entry.get("tied_to"))
        if shared is not None and _code_shapes(shared[1]) != _code_shapes(layer):
            raise CheckpointError(
                f"{source}: the file is damaged: tinyq.plan: layer {name!r} cannot share the codes of "
                f"{entry['tied_to']!r}, which are of another shape"
            )
        made[name] = site, layer if shared is None else layer.share(shared[1])
    for site, layer in made.values():
        site.put(layer)
    return list(made.values())


def _code_shapes(layer: QuantizedLayer) -> list[tuple[torch.Size, ...]]:
    """Of codes, scales and multipliers of each weight."""
    held = (weight.tensors() for weight in layer.coded_weights().values())
    return [tuple(tensor.shape for tensor in tensors if tensor is not None) for tensors in held]


def _materialize(model: nn.Module, entries: Sequence[Mapping[str, Any]], state: Mapping[str, Any]) -> None:
    """Give lazy layers the sizes that the codes have: they have seen no input yet."""
    modules, prefixes = dict(model.named_modules()), prefixes_of_codes(state)
    for entry in entries:
        layer: Any = modules.get(entry["name"])
        found = find_codes(prefixes, [entry["name"]])
        if found and issubclass(type(layer), LazyModuleMixin) and layer.has_uninitialized_params():
            kernel, transposed = getattr(layer, "kernel_size", ()), getattr(layer, "transposed", False)
            if METHODS[entry["method"]].bits == 4:
                columns = columns_of(state, found[0], entry["float_bytes"])
                if columns is None:
                    raise CheckpointError(
                        f"the size of the lazy layer {entry['name']!r} is not known: call the module once"
                    )
                channels = columns // math.prod(kernel) * getattr(layer, "groups", 1)
            else:
                shape = state[f"{found[0]}{CODES[8]}"].shape
                channels = shape[0] if transposed else shape[1] * getattr(layer, "groups", 1)
            layer._infer_parameters(layer, (torch.empty(1, channels, *[1] * len(kernel)),))


def fill_what_is_still_held(made: Sequence[tuple[Site, QuantizedLayer]]) -> Callable[[], None]:
    """A function that gives a float weight the values of its quantized layer, if anything still holds it by then.

    A module may keep a weight in a list or a dict beside the layer, where no state dict reaches it.

    Args:
        made: the float layers, each with the layer that took its place.
    """
    floats = [
        (weakref.ref(weight), layer, name)
        for site, layer in made
        for name, weight in site.kind.float_weights(site.module).items()
    ]

    def fill() -> None:
        for reference, layer, name in floats:
            if (weight := reference()) is not None:
                with torch.no_grad():
                    weight.copy_(layer.coded_weights()[name].dequantize())

    return fill


def _hint(name: str, sites: Mapping[str, Site]) -> str:
    """What to do if the module is a part of the model in the file."""
    part, _, below = name.partition(".")
    while below:
        if below in sites:
            return f". If the file's model has this one as its part {part!r}, give load_quantized part={part!r}"
        step, _, below = below.partition(".")
        part = f"{part}.{step}"
    return ""


def refuse_resuming(trainer: Trainer | None, source: str) -> None:
    """Check that no training is resumed from a quantized checkpoint.

    Raises:
        TrainerError: the Trainer is fitting.
    """
    if trainer is not None and trainer.state.fn == "fit":
        raise TrainerError(
            f"{source} is quantized and holds neither float weights nor optimizer states: resume the training from the "
            "float checkpoint it was made from"
        )
