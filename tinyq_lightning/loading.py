"""Quantized checkpoints back into modules: by ``load_quantized``, a mixin, or a Trainer's ``ckpt_path``."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.parsing import AttributeDict
from omegaconf import OmegaConf
from torch import Tensor, nn

from tinyq_lightning.checkpoint import check_format, is_quantized, read_checkpoint
from tinyq_lightning.errors import CheckpointError
from tinyq_lightning.forward import KernelName
from tinyq_lightning.layers import LAYERS, Int8Weight, QuantizedEmbedding, float_weight
from tinyq_lightning.plain import restore_config
from tinyq_lightning.sites import Site, find_sites

__all__ = ["QuantizedCheckpointMixin", "load_quantized", "prepare_structure"]

Module = TypeVar("Module", bound=LightningModule)


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
        if isinstance(site.module, Int8Weight):
            continue
        state = checkpoint["state_dict"]
        codes = next((state[f"{n}.int8_weights"] for n in site.names if f"{n}.int8_weights" in state), None)
        here = tuple(site.module.weight.shape)
        if codes is not None and tuple(codes.shape) != here:
            raise CheckpointError(
                f"layer {name!r} is [{codes.shape[0]}, {codes.shape[1]}] in {source} and [{here[0]}, {here[1]}] in "
                f"{type(module).__name__}: build it with the arguments it was trained with"
            )
        layer = _empty_layer(site, entry["method"], checkpoint["tinyq"]["spec"].get("kernel", "auto"))
        shared = made.get(entry.get("tied_to"))
        made[name] = site, layer if shared is None else layer.share(shared[1])
    for site, layer in made.values():
        site.put(layer)
    return list(made.values())


def _empty_layer(site: Site, method: str, kernel: KernelName) -> Int8Weight:
    module = site.module
    if isinstance(module, nn.Embedding):
        rows, columns = module.weight.shape
        embedding = QuantizedEmbedding(rows, columns, module.padding_idx, module.weight.dtype, module.weight.device)
        return embedding.train(site.training)
    assert isinstance(module, nn.Linear)
    weight = float_weight(module)
    rows, columns = weight.shape
    layer = LAYERS[method](columns, rows, module.bias is not None, weight.dtype, weight.device)
    layer.kernel = kernel
    return layer.train(site.training)


class QuantizedCheckpointMixin:
    """Makes ``load_from_checkpoint`` and ``ckpt_path`` take quantized checkpoints as well as float ones.

    Put it first: ``class Net(QuantizedCheckpointMixin, LightningModule)``. An ``on_load_checkpoint`` of
    the class still runs, after the layers have been put in.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
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
        check_format(checkpoint, "the checkpoint")
        prepare_structure(module, checkpoint)


def load_quantized(
    path: str | os.PathLike[str], module_class: type[Module], map_location: Any = "cpu", **init_args: Any
) -> Module:
    """Load a quantized checkpoint into a new module of a class that knows nothing of quantization.

    Args:
        path: the file, local or a URL that fsspec knows.
        module_class: the LightningModule it was made from.
        map_location: where the tensors go, as in ``torch.load``.
        **init_args: arguments of the class, over the hyper-parameters stored in the file.

    Returns:
        The module, quantized, bit-equal to the one that was saved, in eval mode.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or does not fit the class.
    """
    content = read_checkpoint(path, map_location)
    try:
        module = _build(module_class, content, init_args)
    except TypeError as error:
        dropped = content["tinyq"].get("dropped")
        hint = f". The file could not hold {', '.join(dropped)}: pass them to load_quantized" if dropped else ""
        raise CheckpointError(f"{path}: {module_class.__name__} could not be built: {error}{hint}") from error
    if is_overridden("configure_model", module):
        module.configure_model()
    prepare_structure(module, content, str(path))
    module.on_load_checkpoint(content)
    try:
        module.load_state_dict(content["state_dict"], strict=module.strict_loading)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: the file does not fit {module_class.__name__}: {error}") from error
    device = next((value.device for value in content["state_dict"].values() if isinstance(value, Tensor)), "cpu")
    return module.to(device).eval()


def _build(module_class: type[Module], content: Mapping[str, Any], init_args: Mapping[str, Any]) -> Module:
    """An instance from the stored hyper-parameters, by the rules of Lightning's ``load_from_checkpoint``."""
    stored = dict(content.get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, {}))
    for name, kind in content["tinyq"].get("configs", {}).items():
        stored[name] = restore_config(kind, stored[name])
    by_cli = stored.pop("_instantiator", None) is not None
    takes = inspect.signature(module_class.__init__).parameters
    whole = content.get(LightningModule.CHECKPOINT_HYPER_PARAMS_NAME)
    if isinstance(whole, str) and whole in takes and takes[whole].kind is not inspect.Parameter.VAR_KEYWORD:
        is_config = content.get(LightningModule.CHECKPOINT_HYPER_PARAMS_TYPE) is not None
        stored = {whole: OmegaConf.create(stored) if is_config else AttributeDict(stored)}
    arguments = stored | dict(init_args)
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in takes.values()):
        arguments = {name: value for name, value in arguments.items() if name in takes or name == "_class_path"}
        unknown = set(init_args) - set(takes)
        if unknown:
            raise TypeError(f"it takes no argument {', '.join(sorted(unknown))}")
    if by_cli:  # LightningCLI stores the objects it built as class_path and init_args
        from lightning.pytorch.cli import instantiate_module

        return instantiate_module(module_class, arguments)
    arguments.pop("_class_path", None)
    return module_class(**arguments)
