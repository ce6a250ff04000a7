"""Loads a quantized checkpoint into a new module."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import nn

from tinyq_lightning.errors import CheckpointError, TinyQError, quoted
from tinyq_lightning.file.checkpoint import read_checkpoint
from tinyq_lightning.file.construction import build
from tinyq_lightning.file.factory import as_factory, name_of, parameters_of
from tinyq_lightning.file.float_entries import FloatEntries
from tinyq_lightning.file.hooks import HookView, dropped_entries
from tinyq_lightning.file.needed import still_needed
from tinyq_lightning.file.part import content_of_part
from tinyq_lightning.file.safetensors import is_safetensors, read_safetensors
from tinyq_lightning.file.structure import fill_what_is_still_held, prepare_structure
from tinyq_lightning.file.validate import HYPER_PARAMETERS
from tinyq_lightning.file.weightless import take_values, watched_meta_tensors, without_weights
from tinyq_lightning.file.wrapped_names import named_as_in
from tinyq_lightning.plan import refuse_save_pretrained

__all__ = [
    "load_content",
    "load_quantized",
    "read_content",
]

if TYPE_CHECKING:
    from tinyq_lightning.layers import QuantizedLayer
    from tinyq_lightning.plan import Site

Module = TypeVar("Module", bound=nn.Module)


@overload
def load_quantized(
    path: str | os.PathLike[str],
    module_class: Callable[..., Module],
    map_location: Any = "cpu",
    *,
    part: str = "",
    strict: bool | None = None,
    trust: bool = False,
    **init_args: Any,
) -> Module: ...


@overload
def load_quantized(
    path: str | os.PathLike[str],
    module_class: str,
    map_location: Any = "cpu",
    *,
    part: str = "",
    strict: bool | None = None,
    trust: bool = False,
    **init_args: Any,
) -> nn.Module: ...


def load_quantized(
    path: str | os.PathLike[str],
    module_class: Callable[..., nn.Module] | str,
    map_location: Any = "cpu",
    *,
    part: str = "",
    strict: bool | None = None,
    trust: bool = False,
    **init_args: Any,
) -> nn.Module:
    """Load a quantized checkpoint into a new module of a class that knows nothing of quantization.

    Lightning is not imported, unless the class is one of Lightning's. Peak memory is the quantized model, if the module
    can be built without the values of its weights. Otherwise the float weights that the class makes are added to it.

    Args:
        path: the file, a local path or a URL that fsspec can open; or a safetensors file made from one, a local path.
        module_class: the LightningModule it was made from; or any class of modules with layers of the same names, or a
            function that makes such a module; or where to import it: ``package.module:Class``. Hyper-parameters in the
            file are given to it if it takes arguments of their names.
        map_location: the device the module goes to, as in ``torch.load``.
        part: the attribute of the model in the file that is loaded: ``net`` for what was ``self.net`` of a
            LightningModule, if ``module_class`` makes only that. Nothing else of the model is needed then.
        strict: whether names must match exactly; if None, the ``strict_loading`` of a LightningModule, and True for
            another.
        trust: let the file name what is imported and called: objects that LightningCLI stored as ``class_path``,
            resolvers in OmegaConf configurations, classes of hyper-parameters. Only for files of people you trust.
        **init_args: arguments of the class or function; they replace the hyper-parameters stored in the file. An entry
            of a stored argument is given by its dotted name, ``**{"block.cls": Block}``, an entry of
            ``on_save_checkpoint`` that the file could not hold by its name.

    Returns:
        The module, quantized, bit-equal to the one that was saved, in eval mode.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, does not fit the class, could not hold an
            argument that is not given, or needs ``trust``.
        ModelError: there is no such class, or it makes no module.
    """
    factory = as_factory(module_class)
    content = read_content(path)
    if part:
        content = content_of_part(content, part, str(path))
    module: nn.Module = load_content(content, factory, init_args, str(path), map_location, strict, trust)
    return module.eval()


def read_content(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a quantized checkpoint, or of a safetensors file made from one.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it is none of these.
        MissingExtraError: it is a safetensors file, and safetensors is not installed.
    """
    return read_safetensors(path) if is_safetensors(path) else read_checkpoint(path)


def load_content(
    content: Mapping[str, Any],
    module_class: Callable[..., Module],
    init_args: Mapping[str, Any],
    source: str,
    map_location: Any = "cpu",
    strict: bool | None = None,
    trust: bool = False,
) -> Module:
    """As :func:`load_quantized`, from the content of a checked file; the module stays in the mode it was built in."""
    built, fill = _built_weightless(module_class, content, init_args, source, trust), None
    if built is None:
        module, state_dict, made = _built(module_class, content, init_args, source, trust)
        fill = fill_what_is_still_held(made)
        del made  # with the float layers
    else:
        module, state_dict = built
    strict = getattr(module, "strict_loading", True) if strict is None else strict
    try:
        module.load_state_dict(named_as_in(module, state_dict), strict=strict)
    except Exception as error:  # load_state_dict raises RuntimeError, hooks of the class anything
        raise CheckpointError(f"{source}: the file does not fit {name_of(module_class)}: {error}") from error
    if fill is not None:
        fill()
    refuse_save_pretrained(module)
    return module.to(_device(map_location))


def _built_weightless(
    module_class: Callable[..., Module],
    content: Mapping[str, Any],
    init_args: Mapping[str, Any],
    source: str,
    trust: bool,
) -> tuple[Module, Mapping[str, Any]] | None:
    """A module that has the tensors of the file as its own, and those; None if it cannot be built without values."""
    try:
        with watched_meta_tensors() as leaves_any:
            with without_weights():
                module, state_dict, made = _built(module_class, content, init_args, source, trust)
            del made  # the float layers, whose tensors are on the meta device
            taken = take_values(module, named_as_in(module, state_dict))
            return (module, state_dict) if taken and not leaves_any() else None
    except CheckpointError as error:
        if _is_of_the_class(error):
            return None
        raise
    except Exception:  # an __init__ that needs values can raise anything on meta tensors
        return None


def _is_of_the_class(error: CheckpointError) -> bool:
    """True if the error is one that the class raised, which may be other with real weights."""
    return error.__cause__ is not None and not isinstance(error.__cause__, TinyQError)


def _built(
    module_class: Callable[..., Module],
    content: Mapping[str, Any],
    init_args: Mapping[str, Any],
    source: str,
    trust: bool,
) -> tuple[Module, Mapping[str, Any], list[tuple[Site, QuantizedLayer]]]:
    """A module with the structure of the checkpoint, without its values.

    Returns:
        The module, the state dict for it, and its float layers with what replaced them.
    """
    name = name_of(module_class)
    entries = {key: value for key, value in init_args.items() if key in dropped_entries(content)}
    arguments = {
        key: value for key, value in init_args.items() if key not in entries or _is_argument(key, module_class, content)
    }
    try:
        module = build(module_class, content, arguments, trust, source)
    except TinyQError:
        raise
    except Exception as error:  # TypeError for arguments that do not fit, or whatever the class raises for them
        stored = content.get(HYPER_PARAMETERS)
        given = arguments.keys() | (stored.keys() if isinstance(stored, Mapping) else set())
        kind = "" if isinstance(error, TypeError) else f"{type(error).__name__}: "
        raise CheckpointError(
            f"{source}: {name} could not be built from the file's hyper_parameters: {kind}{error}. The file holds what "
            f"save_hyperparameters saved; give the rest, as in load_quantized(path, {name}, "
            f"{still_needed(module_class, given)})"
        ) from error
    made = prepare_structure(module, content, source)
    hook = getattr(module, "on_load_checkpoint", None)  # a LightningModule has it
    if hook is None:
        return module, content["state_dict"], made
    view = HookView(content, module_class, source, entries, arguments, trust)
    try:
        hook(view)
    except TinyQError:
        raise
    except Exception as error:
        raise CheckpointError(f"{source}: on_load_checkpoint of {name} failed: {quoted(error)}") from error
    state_dict = view.get("state_dict", content["state_dict"])
    return module, state_dict.entries() if isinstance(state_dict, FloatEntries) else state_dict, made


def _is_argument(name: str, module_class: Any, content: Mapping[str, Any]) -> bool:
    """Whether the class takes an argument of a name, or was made with one through its ``**kwargs``."""
    stored = content.get(HYPER_PARAMETERS, {})
    dropped = content["tinyq"].get("dropped", ())
    return name in parameters_of(module_class) or name in stored or f"{HYPER_PARAMETERS}.{name}" in dropped


def _device(map_location: Any) -> torch.device:
    """The device to which ``map_location``, as in ``torch.load``, moves a tensor of the CPU."""
    if callable(map_location):
        moved = map_location(torch.UntypedStorage(0), "cpu")  # type: ignore[no-untyped-call]
        return torch.device("cpu") if moved is None else torch.device(moved.device)
    if isinstance(map_location, Mapping):
        map_location = map_location.get("cpu")
    return torch.device("cpu" if map_location is None else map_location)
