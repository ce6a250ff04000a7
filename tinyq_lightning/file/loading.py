"""Quantized checkpoints back into modules: by ``load_quantized``, a mixin, or a Trainer's ``ckpt_path``."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from tinyq_lightning.errors import CheckpointError, ModelError, TrainerError
from tinyq_lightning.file.build import build, import_class
from tinyq_lightning.file.checkpoint import HYPER_PARAMETERS, check_digests, check_format, is_quantized, read_checkpoint
from tinyq_lightning.file.weightless import take_values, without_weights
from tinyq_lightning.layers import Int8Weight
from tinyq_lightning.plan import Site, carry_over, find_sites

__all__ = [
    "QuantizedCheckpointMixin",
    "load_quantized",
    "prepare_structure",
    "refuse_resuming",
]

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

Module = TypeVar("Module", bound="LightningModule")


def prepare_structure(
    module: nn.Module, checkpoint: Mapping[str, Any], source: str = "the checkpoint"
) -> list[tuple[Site, Int8Weight]]:
    """Put empty quantized layers where the checkpoint's plan has them, for ``load_state_dict`` to fill.

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
    # an embedding that the class ties to a layer only later is known by the plan alone
    found = find_sites(module, embeddings=[entry["name"] for entry in entries])
    sites = {name: site for site in found for name in site.names}
    made: dict[str, tuple[Site, Int8Weight]] = {}
    for entry in entries:
        name = entry["name"]
        site = sites.get(name)
        if site is None:
            raise CheckpointError(
                f"{source} has the quantized layer {name!r}, {type(module).__name__} has no Linear layer of that name. "
                f"It has: {', '.join(sorted(sites)) or 'none'}"
            )
        if site.is_quantized:
            continue
        state = checkpoint["state_dict"]
        codes = next((state[f"{n}.int8_weights"] for n in site.names if f"{n}.int8_weights" in state), None)
        here = tuple(site.weight_like.shape)
        if codes is not None and tuple(codes.shape) != here:
            raise CheckpointError(
                f"layer {name!r} is [{codes.shape[0]}, {codes.shape[1]}] in {source} and [{here[0]}, {here[1]}] in "
                f"{type(module).__name__}: build it with the arguments it was trained with"
            )
        kernel = checkpoint["tinyq"]["spec"].get("kernel", "auto")
        layer = site.kind.make_empty(site.module, entry["method"], kernel)
        carry_over(site, layer)
        shared = made.get(entry.get("tied_to"))
        made[name] = site, layer if shared is None else layer.share(shared[1])
    for site, layer in made.values():
        site.put(layer)
    return list(made.values())


class QuantizedCheckpointMixin:
    """Makes ``load_from_checkpoint`` and ``ckpt_path`` take quantized checkpoints as well as float ones.

    Put it first: ``class Net(QuantizedCheckpointMixin, LightningModule)``. An ``on_load_checkpoint`` of
    the class still runs, after the layers have been put in.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        from lightning.pytorch import LightningModule

        order = cls.__mro__
        if LightningModule in order and order.index(LightningModule) < order.index(QuantizedCheckpointMixin):
            raise ModelError(
                f"write QuantizedCheckpointMixin first: class {cls.__name__}(QuantizedCheckpointMixin, ...)"
            )
        own = cls.__dict__.get("on_load_checkpoint")
        if own is not None:

            def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
                _prepare_if_quantized(self, checkpoint)
                own(self, checkpoint)

            cls.on_load_checkpoint = on_load_checkpoint  # type: ignore[method-assign]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook, called before the state dict is loaded."""
        _prepare_if_quantized(self, checkpoint)
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]


def _prepare_if_quantized(module: Any, checkpoint: dict[str, Any]) -> None:
    if is_quantized(checkpoint):
        refuse_resuming(getattr(module, "_trainer", None), "the checkpoint")
        if left_out := _left_out(checkpoint):
            rank_zero_warn(f"the quantized checkpoint does not hold {', '.join(left_out)}: give them as they were")
        check_format(checkpoint, "the checkpoint")
        check_digests(checkpoint, "the checkpoint", only=("state_dict", "tinyq"))
        prepare_structure(module, checkpoint)


@overload
def load_quantized(
    path: str | os.PathLike[str],
    module_class: type[Module],
    map_location: Any = "cpu",
    *,
    strict: bool | None = None,
    **init_args: Any,
) -> Module: ...


@overload
def load_quantized(
    path: str | os.PathLike[str],
    module_class: str,
    map_location: Any = "cpu",
    *,
    strict: bool | None = None,
    **init_args: Any,
) -> LightningModule: ...


def load_quantized(
    path: str | os.PathLike[str],
    module_class: type[LightningModule] | str,
    map_location: Any = "cpu",
    *,
    strict: bool | None = None,
    **init_args: Any,
) -> LightningModule:
    """Load a quantized checkpoint into a new module of a class that knows nothing of quantization.

    No float weight takes memory on the way, where the class can be built without their values: the most
    that is held is the quantized model.

    Args:
        path: the file, local or a URL that fsspec knows.
        module_class: the LightningModule it was made from, or where to import it: ``package.module:Class``.
        map_location: the device the module goes to, as in ``torch.load``.
        strict: whether names must match exactly; the module's ``strict_loading`` where None.
        **init_args: arguments of the class, over the hyper-parameters stored in the file.

    Returns:
        The module, quantized, bit-equal to the one that was saved, in eval mode.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or does not fit the class.
        ModelError: there is no such class.
    """
    from lightning.pytorch import LightningModule

    if isinstance(module_class, str):
        module_class = import_class(module_class, LightningModule)
    if not (isinstance(module_class, type) and issubclass(module_class, LightningModule)):
        raise ModelError(f"load_quantized takes a LightningModule class, not {module_class!r:.80}")
    content = read_checkpoint(path)
    module = _built_weightless(module_class, content, init_args, str(path))
    if module is None:
        module = _built(module_class, content, init_args, str(path))
    try:
        module.load_state_dict(content["state_dict"], strict=module.strict_loading if strict is None else strict)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: the file does not fit {module_class.__name__}: {error}") from error
    return module.to(_device(map_location)).eval()


def _built_weightless(
    module_class: type[LightningModule], content: Mapping[str, Any], init_args: Mapping[str, Any], source: str
) -> LightningModule | None:
    """A module with the memory of the file's tensors for its own; None where the class needs real weights."""
    try:
        with without_weights() as leaves_any:
            module = _built(module_class, content, init_args, source)
        return module if take_values(module, content["state_dict"]) and not leaves_any() else None
    except CheckpointError:
        raise
    except (
        Exception
    ):  # whatever a class does in __init__ that cannot be done without values; it is built with them next
        return None


def _built(
    module_class: type[LightningModule], content: Mapping[str, Any], init_args: Mapping[str, Any], source: str
) -> LightningModule:
    """A module with the structure of the checkpoint, before its values."""
    takes = inspect.signature(module_class.__init__).parameters
    missing = [name for name in _left_out(content) if name in takes and name not in init_args]
    if missing:
        raise CheckpointError(
            f"{source}: the file could not hold {', '.join(missing)}, which {module_class.__name__} was made with: "
            f"give it as it was, as in load_quantized(path, {module_class.__name__}, {missing[0]}=...)"
        )
    try:
        module = build(module_class, content, init_args)
    except TypeError as error:
        name = module_class.__name__
        raise CheckpointError(
            f"{source}: {name} could not be built: {error}. The file holds what save_hyperparameters saved; give the "
            f"rest, as in load_quantized(path, {name}, argument=...)"
        ) from error
    prepare_structure(module, content, source)
    # what the user's hook changes is for this module alone
    module.on_load_checkpoint({**content, "state_dict": content["state_dict"].copy()})
    return module


def _left_out(checkpoint: Mapping[str, Any]) -> list[str]:
    """Hyper-parameters that the file could not hold."""
    prefix = f"{HYPER_PARAMETERS}."
    dropped = checkpoint["tinyq"].get("dropped", ())
    return [name.removeprefix(prefix) for name in dropped if name.startswith(prefix)]


def refuse_resuming(trainer: Trainer | None, source: str) -> None:
    """Refuse to go on training from a quantized checkpoint.

    Raises:
        TrainerError: the Trainer is fitting.
    """
    if trainer is not None and trainer.state.fn == "fit":
        raise TrainerError(
            f"{source} is quantized and holds neither float weights nor optimizer states: resume the training from the "
            "float checkpoint it was made from"
        )


def _device(map_location: Any) -> torch.device:
    """The device that ``map_location`` of ``torch.load`` means for what lies on the CPU."""
    if callable(map_location):
        moved = map_location(torch.UntypedStorage(0), "cpu")  # type: ignore[no-untyped-call]
        return torch.device("cpu") if moved is None else torch.device(moved.device)
    if isinstance(map_location, Mapping):
        map_location = map_location.get("cpu")
    return torch.device("cpu" if map_location is None else map_location)
