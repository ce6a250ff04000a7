"""Quantizes a float checkpoint file without a Trainer and without the float model in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tinyq_lightning.errors import CheckpointError, TinyQError
from tinyq_lightning.file.archive import Archive
from tinyq_lightning.file.by_layer import ByLayer
from tinyq_lightning.file.checkpoint import file_sha256, make_checkpoint, warn_of_left_out
from tinyq_lightning.file.construction import build
from tinyq_lightning.file.folder import Folder
from tinyq_lightning.file.hooks import HookView
from tinyq_lightning.file.mixin import QuantizedCheckpointMixin
from tinyq_lightning.file.validate import is_quantized, without_training_entries
from tinyq_lightning.file.weightless import (
    drop_weak_references,
    named_tensors,
    put_value,
    without_weights,
)
from tinyq_lightning.layers import Int8Weight
from tinyq_lightning.namespaces import namespace_of
from tinyq_lightning.plan import WithValues, find_sites, quantize_by_layer
from tinyq_lightning.spec import QuantizationSpec

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

__all__ = [
    "FloatFile",
    "quantize_file",
]


def quantize_file(
    source: Archive | Folder,
    module_class: type[LightningModule],
    spec: QuantizationSpec,
    init_args: Mapping[str, Any],
    around: WithValues = nullcontext,
    trust: bool = False,
) -> dict[str, Any]:
    """Make the same quantized checkpoint of a float checkpoint as ``TinyQCallback`` does.

    Peak memory is the quantized model and one float layer, or the float model if :class:`FloatFile` must load it.

    Args:
        source: the open float checkpoint.
        module_class: the LightningModule it was made from.
        spec: what to quantize, and how.
        init_args: arguments of the class; they replace the hyper-parameters stored in the file.
        trust: import and call the classes that the stored hyper-parameters name.
        around: a context manager entered for each layer while it is quantized, for a progress bar.

    Returns:
        The content for :func:`~tinyq_lightning.file.checkpoint.write_checkpoint`, without metrics.

    Raises:
        CheckpointError: the file is not a float Lightning checkpoint, or does not fit the class.
        SpecError: the spec does not fit the model.
        ModelError: a weight cannot be quantized.
    """
    model = FloatFile(source, module_class, init_args, trust)

    @contextmanager
    def present(layer: nn.Module) -> Iterator[None]:
        with around(layer), model.present(layer):
            yield

    plan = quantize_by_layer(model.module, spec, present)
    for layer in model.module.modules():
        if isinstance(layer, Int8Weight) and layer.bits == 4:
            layer.form("int4")  # which holds the codes as the file has them, and the layer no others then
    model.fill()
    base = source.read_all(_apart_from_weights(source.content))
    content = make_checkpoint(base, model.module.state_dict(), plan, {}, file_sha256(source.path), None)
    warn_of_left_out(content)
    return content


class FloatFile:
    """A float checkpoint as a module whose weights are read one layer at a time.

    All weights are loaded at once instead if the class cannot be built without values, or if loading may do more
    than copy each entry into the tensor of its name (hooks, other names).

    Args:
        source: the open float checkpoint.
        module_class: the LightningModule it was made from.
        init_args: arguments of the class; they replace the hyper-parameters stored in the file.
        trust: import and call the classes that the stored hyper-parameters name.

    Attributes:
        module: the float module. Its tensors are on the meta device, or have values if ``loaded`` is True.
        loaded: True if all weights were loaded at once.

    Raises:
        CheckpointError: the file is not a float Lightning checkpoint, or does not fit the class.
    """

    def __init__(
        self,
        source: Archive | Folder,
        module_class: type[LightningModule],
        init_args: Mapping[str, Any],
        trust: bool = False,
    ) -> None:
        content = source.content
        if is_quantized(content):
            raise CheckpointError(f"{source.path}: it is quantized already: give the float checkpoint it was made from")
        if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
            raise CheckpointError(f"{source.path}: it has no state_dict: is it a Lightning checkpoint?")
        self._source, self._trust = source, trust
        self._by_layer: ByLayer | None = None
        module = self._weightless(module_class, init_args)
        self.loaded = module is None
        self.module: LightningModule = self._loaded(module_class, init_args) if module is None else module

    def present(self, layer: nn.Module) -> AbstractContextManager[None]:
        """Context manager in which the parameters and buffers of ``layer`` have their values."""
        return nullcontext() if self._by_layer is None else self._by_layer.present(layer)

    def fill(self) -> None:
        """Read every tensor that is still on the meta device."""
        if self._by_layer is not None:
            self._by_layer.fill()

    def _weightless(self, module_class: type[LightningModule], init_args: Mapping[str, Any]) -> LightningModule | None:
        state_dict = self._source.content["state_dict"]
        try:
            with without_weights():
                content = self._source.read_all(_apart_from_weights(self._source.content))
                module = build(module_class, content, init_args, self._trust, self._source.path)
            if not _loads_as_it_stands(module, state_dict):
                return None
            by_layer = ByLayer(module, lambda name: self._source.read(state_dict[name]))
            layers = [tensor for site in find_sites(module) for _, tensor in named_tensors(site.module)]
            if any(tensor.is_meta and not by_layer.knows(tensor) for tensor in layers):
                return None
            drop_weak_references(module)
            for name, tensor in module.state_dict(keep_vars=True).items():
                put_value(tensor, torch.empty_like(tensor, dtype=state_dict[name].dtype, device="meta"))
            self._by_layer = by_layer
            return module
        except CheckpointError:
            raise
        except Exception:  # an __init__ that needs values can raise anything on meta tensors
            return None

    def _loaded(self, module_class: type[LightningModule], init_args: Mapping[str, Any]) -> LightningModule:
        content = self._source.read_all(without_training_entries(self._source.content))
        try:
            module = build(module_class, content, init_args, self._trust, self._source.path)
            content = HookView(content, module_class, self._source.path)
            module.on_load_checkpoint(content)
            module.load_state_dict(content["state_dict"], strict=module.strict_loading)
        except TinyQError:
            raise
        except Exception as error:  # the class, its hook or load_state_dict can raise anything
            message = f"{self._source.path}: it does not fit {module_class.__name__}: {error}"
            raise CheckpointError(message) from error
        return module


def _apart_from_weights(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in without_training_entries(content).items() if key != "state_dict"}


def _loads_as_it_stands(module: LightningModule, state_dict: Mapping[str, Any]) -> bool:
    """True if ``load_state_dict`` copies each entry into the tensor of its name and does nothing else."""
    own = module.state_dict(keep_vars=True)
    same = own.keys() == state_dict.keys() and all(
        isinstance(tensor, Tensor) and type(state_dict[name]) is Tensor and tensor.shape == state_dict[name].shape
        for name, tensor in own.items()
    )
    lightnings = namespace_of(module).pytorch.LightningModule.on_load_checkpoint
    known_hooks = (lightnings, QuantizedCheckpointMixin.on_load_checkpoint)
    return (
        same
        and type(module).on_load_checkpoint in known_hooks
        and type(module).load_state_dict is nn.Module.load_state_dict
        and not any(_loads_in_its_own_way(each) for each in module.modules())
    )


def _loads_in_its_own_way(module: nn.Module) -> bool:
    loader = type(module)._load_from_state_dict.__module__.partition(".")[0]
    return bool(
        loader not in ("torch", "torchmetrics")
        or module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
    )
