"""Modules built from what a checkpoint says of them: a class by its path, its stored hyper-parameters."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import OmegaConf

from tinyq_lightning.errors import CheckpointError, ModelError
from tinyq_lightning.file.checkpoint import HYPER_PARAMETERS, HYPER_PARAMETERS_NAME, HYPER_PARAMETERS_TYPE
from tinyq_lightning.file.plain import restore_config

__all__ = [
    "build",
    "import_class",
]

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

Kind = TypeVar("Kind")
Module = TypeVar("Module", bound="LightningModule")


def import_class(path: str, base: type[Kind]) -> type[Kind]:
    """The class at ``package.module:Class``; ``package.module.Class`` does as well.

    Raises:
        ModelError: there is none, or it is not a ``base``.
    """
    module_name, colon, name = path.partition(":")
    if not colon:
        module_name, _, name = path.rpartition(".")
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(f"{path!r} cannot be imported: {error}. Write it as package.module:Class") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ModelError(f"{path!r} is not a {base.__name__}")
    return found


def build(module_class: type[Module], content: Mapping[str, Any], init_args: Mapping[str, Any]) -> Module:
    """An instance from the stored hyper-parameters, by the rules of Lightning's ``load_from_checkpoint``.

    Args:
        module_class: the class.
        content: of a checkpoint, float or quantized.
        init_args: arguments over the stored ones.

    Raises:
        TypeError: the arguments are not those of the class.
        CheckpointError: the checkpoint names another class than the one given.
    """
    from lightning.pytorch.utilities.model_helpers import is_overridden
    from lightning.pytorch.utilities.parsing import AttributeDict

    stored = dict(content.get(HYPER_PARAMETERS, {}))
    for name, kind in content.get("tinyq", {}).get("configs", {}).items():
        stored[name] = restore_config(kind, stored[name])
    by_cli = stored.pop("_instantiator", None) is not None
    takes = inspect.signature(module_class.__init__).parameters
    whole = content.get(HYPER_PARAMETERS_NAME)
    if isinstance(whole, str) and whole in takes and takes[whole].kind is not inspect.Parameter.VAR_KEYWORD:
        is_config = content.get(HYPER_PARAMETERS_TYPE) is not None
        stored = {whole: OmegaConf.create(stored) if is_config else AttributeDict(stored)}
    arguments = stored | dict(init_args)
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in takes.values()):
        arguments = {name: value for name, value in arguments.items() if name in takes or name == "_class_path"}
        unknown = set(init_args) - set(takes)
        if unknown:
            raise TypeError(f"it takes no argument {', '.join(sorted(unknown))}")
    if by_cli:  # LightningCLI stores the objects it built as class_path and init_args
        from lightning.pytorch.cli import instantiate_module

        _refuse_other_class(arguments.get("_class_path"), module_class)
        module = instantiate_module(module_class, arguments)
    else:
        arguments.pop("_class_path", None)
        module = module_class(**arguments)
    if is_overridden("configure_model", module):
        module.configure_model()
    return module


def _refuse_other_class(class_path: str | None, module_class: type[LightningModule]) -> None:
    """A file does not decide what is imported: the class it names must be there already, and a fitting one."""
    module_name, _, name = (class_path or "").rpartition(".")
    found = getattr(sys.modules.get(module_name), name, None)
    if class_path is not None and not (isinstance(found, type) and issubclass(found, module_class)):
        raise CheckpointError(
            f"the checkpoint was made from {class_path}, which is no {module_class.__name__} that has been imported: "
            "import it, or give that class"
        )
