"""Quantizes a float checkpoint file without a Trainer and without the float model in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tinyq_lightning.errors import CheckpointError, TinyQError
from tinyq_lightning.file.archive import Archive
from tinyq_lightning.file.by_layer import ByLayer
from tinyq_lightning.file.checkpoint import file_sha256, make_checkpoint, warn_of_left_out
from tinyq_lightning.file.construction import build
from tinyq_lightning.file.factory import is_lightning_class, name_of, overrides
from tinyq_lightning.file.folder import Folder
from tinyq_lightning.file.hooks import HookView
from tinyq_lightning.file.mixin import QuantizedCheckpointMixin
from tinyq_lightning.file.validate import apart_from_weights, is_quantized, without_training_entries
from tinyq_lightning.file.weightless import (
    drop_weak_references,
    named_tensors,
    put_value,
    without_weights,
)
from tinyq_lightning.file.wrapped_names import named_as_in
from tinyq_lightning.layers import Int8Weight, QuantizedRecurrent
from tinyq_lightning.plan import Coverage, WithValues, find_sites, quantize_by_layer
from tinyq_lightning.spec import QuantizationSpec

__all__ = [
    "FloatFile",
    "float_content",
    "quantize_file",
]


def quantize_file(
    source: Archive | Folder,
    module_class: Callable[..., nn.Module],
    spec: QuantizationSpec,
    init_args: Mapping[str, Any],
    around: WithValues = nullcontext,
    trust: bool = False,
) -> tuple[dict[str, Any], Coverage]:
    """Make the same quantized checkpoint of a float checkpoint as ``TinyQCallback`` does, or one of a state dict.

    Peak memory is the quantized model and one float layer, or the float model if :class:`FloatFile` must load it.

    Args:
        source: the open float checkpoint.
        module_class: the class, or the function, that makes the module, of Lightning or of plain PyTorch.
        spec: what to quantize, and how.
        init_args: arguments of the class; they replace the hyper-parameters stored in the file.
        trust: import and call the classes that the stored hyper-parameters name.
        around: a context manager entered for each layer while it is quantized, for a progress bar.

    Returns:
        The content for :func:`~tinyq_lightning.file.checkpoint.write_checkpoint`, without metrics; and how much of the
        model's weights is quantized.

    Raises:
        CheckpointError: the file is neither a float Lightning checkpoint nor a state dict, or does not fit the class.
        SpecError: the spec does not fit the model.
        ModelError: a weight cannot be quantized.
    """
    model = FloatFile(source, module_class, init_args, trust)

    @contextmanager
    def present(layer: nn.Module) -> Iterator[None]:
        with around(layer), model.present(layer):
            yield

    plan = quantize_by_layer(model.module, spec, present, _hold_as_in_the_file)
    _hold_as_in_the_file(model.module)  # matrices too, which no layer holds
    model.fill()
    base = source.read_all(apart_from_weights(model.content))
    content = make_checkpoint(base, model.module.state_dict(), plan, {}, file_sha256(source.path), None)
    warn_of_left_out(content)
    return content, plan.coverage


def _hold_as_in_the_file(module: nn.Module) -> None:
    """Hold codes of four bits two a byte, and no others."""
    for layer in module.modules():
        if isinstance(layer, Int8Weight) and layer.bits == 4:
            layer.form("int4")
        elif isinstance(layer, QuantizedRecurrent) and layer.bits == 4:
            layer.pack()


class FloatFile:
    """A float checkpoint, or a state dict in a file, as a module whose weights are read one layer at a time.

    Names may be those of modules that ``torch.compile`` has wrapped (``net._orig_mod.weight``). All weights are loaded
    at once instead if the class cannot be built without values, or if loading may do more than copy each entry into
    the tensor of its name (hooks, other names).

    Args:
        source: the open float checkpoint.
        module_class: the class, or the function, that makes the module.
        init_args: arguments of the class; they replace the hyper-parameters stored in the file.
        trust: import and call the classes that the stored hyper-parameters name.

    Attributes:
        content: of the file, with the weights as ``state_dict``; its tensors are on the meta device.
        module: the float module. Its tensors are on the meta device, or have values if ``loaded`` is True.
        loaded: True if all weights were loaded at once.

    Raises:
        CheckpointError: the file is neither a float Lightning checkpoint nor a state dict, or does not fit the class.
    """

    def __init__(
        self,
        source: Archive | Folder,
        module_class: Callable[..., nn.Module],
        init_args: Mapping[str, Any],
        trust: bool = False,
    ) -> None:
        content = source.content
        if is_quantized(content):
            raise CheckpointError(f"{source.path}: it is quantized already: give the float checkpoint it was made from")
        self.content = float_content(content, source.path)
        self._source, self._trust = source, trust
        self._by_layer: ByLayer | None = None
        module = self._weightless(module_class, init_args)
        self.loaded = module is None
        self.module: nn.Module = self._loaded(module_class, init_args) if module is None else module

    def present(self, layer: nn.Module) -> AbstractContextManager[None]:
        """Context manager in which the parameters and buffers of ``layer`` have their values."""
        return nullcontext() if self._by_layer is None else self._by_layer.present(layer)

    def fill(self) -> None:
        """Read every tensor that is still on the meta device."""
        if self._by_layer is not None:
            self._by_layer.fill()

    def _weightless(self, factory: Callable[..., nn.Module], init_args: Mapping[str, Any]) -> nn.Module | None:
        try:
            with without_weights():
                content = self._source.read_all(apart_from_weights(self.content))
                module = build(factory, content, init_args, self._trust, self._source.path)
            state_dict = named_as_in(module, self.content["state_dict"])
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

    def _loaded(self, factory: Callable[..., nn.Module], init_args: Mapping[str, Any]) -> nn.Module:
        content: Any = self._source.read_all(without_training_entries(self.content))
        module: Any = None
        try:
            module = build(factory, content, init_args, self._trust, self._source.path)
            content["state_dict"] = named_as_in(module, content["state_dict"])
            if is_lightning_class(type(module)):
                content = HookView(content, factory, self._source.path)
                module.on_load_checkpoint(content)
            module.load_state_dict(content["state_dict"], strict=getattr(module, "strict_loading", True))
        except TinyQError:
            raise
        except Exception as error:  # the class, its hook or load_state_dict can raise anything
            of_entries = str(error).startswith("Error(s) in loading state_dict")
            why = _why_not(module, content["state_dict"]) if of_entries else None
            what = why or (str(error) if of_entries else f"{type(error).__name__}: {error}")
            raise CheckpointError(f"{self._source.path}: it does not fit {name_of(factory)}: {what}") from error
        made: nn.Module = module
        return made


def float_content(content: Any, path: str) -> dict[str, Any]:
    """What a float file holds, as a checkpoint: a file of ``torch.save(module.state_dict())`` holds weights alone.

    So does one of ``torch.save({"model": module.state_dict(), …})``, under whatever name, if there are no others.

    Raises:
        CheckpointError: it holds neither, or several.
    """
    if isinstance(content, nn.Module):
        raise CheckpointError(
            f"{path}: it holds a whole {type(content).__name__}, not its weights: "
            "torch.save(module.state_dict(), path) writes a file of them"
        )
    entries = content if isinstance(content, dict) else {}
    if isinstance(entries.get("state_dict"), dict):
        return entries
    if _is_state_dict(entries):
        return {"state_dict": entries}
    found = [name for name, value in entries.items() if isinstance(value, dict) and _is_state_dict(value)]
    if len(found) == 1:
        return {"state_dict": entries[found[0]]}
    if found:
        raise CheckpointError(
            f"{path}: it has several state dicts, {', '.join(map(repr, found))}: write a file of the one you mean, "
            f"as torch.save(torch.load(path)[{found[0]!r}], new_path) does"
        )
    raise CheckpointError(
        f"{path}: it has no state_dict: it is neither a Lightning checkpoint nor a state dict that torch.save wrote"
    )


def _is_state_dict(entries: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in entries.values()) and all(
        isinstance(name, str) for name in entries
    )


def _why_not(module: nn.Module, state_dict: Mapping[str, Any]) -> str | None:
    """The first thing that keeps a state dict from a module, and how many more there are; None if that is not told."""
    own, here = module.state_dict(keep_vars=True), type(module).__name__
    told = [
        f"{name!r} is {list(value.shape)} in the file and {list(own[name].shape)} in {here}"
        for name, value in state_dict.items()
        if isinstance(value, Tensor) and isinstance(own.get(name), Tensor) and value.shape != own[name].shape
    ]
    told += [f"{name!r} is in {here} and not in the file" for name in own if name not in state_dict]
    told += [f"{name!r} is in the file and not in {here}" for name in state_dict if name not in own]
    if not told:
        return None
    more = f" (and {len(told) - 1} more differ)" if len(told) > 1 else ""
    return f"{told[0]}{more}: build it with the arguments it was trained with, or give the class that it is of"


def _loads_as_it_stands(module: nn.Module, state_dict: Mapping[str, Any]) -> bool:
    """True if ``load_state_dict`` copies each entry into the tensor of its name and does nothing else."""
    own = module.state_dict(keep_vars=True)
    same = own.keys() == state_dict.keys() and all(
        isinstance(tensor, Tensor) and type(state_dict[name]) is Tensor and tensor.shape == state_dict[name].shape
        for name, tensor in own.items()
    )
    return (
        same
        and not _has_hook(module)
        and type(module).load_state_dict is nn.Module.load_state_dict
        and not any(_loads_in_its_own_way(each) for each in module.modules())
    )


def _has_hook(module: Any) -> bool:
    """Whether a LightningModule changes what it loads, in an ``on_load_checkpoint`` of its own."""
    ours = QuantizedCheckpointMixin.on_load_checkpoint
    return overrides(module, "on_load_checkpoint") and type(module).on_load_checkpoint is not ours


def _loads_in_its_own_way(module: nn.Module) -> bool:
    loader = type(module)._load_from_state_dict.__module__.partition(".")[0]
    return bool(
        loader not in ("torch", "torchmetrics")
        or module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
    )
