"""The quantized model that is exported: the one given, or one that a file holds."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from tinyq_lightning.errors import ExportError, ModelError
from tinyq_lightning.file import as_factory, content_of_part, load_content, read_content
from tinyq_lightning.layers import QuantizedLayer
from tinyq_lightning.methods import METHODS

__all__ = [
    "Method",
    "callable_module",
    "methods_that_round",
    "model_from",
    "on_cpu",
    "rounding_noise",
]


_COARSE = 0.15


class Method(nn.Module):
    """A method of a module as the ``forward`` of another, which exporters call.

    Args:
        module: the module.
        method: name of the method.
    """

    def __new__(cls, module: nn.Module, method: str) -> Method:
        """An instance of a subclass whose ``forward`` has the method's parameters, by which exporters name inputs."""

        def forward(self: Method, *args: Any, **kwargs: Any) -> Any:
            return getattr(self.module, method)(*args, **kwargs)

        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        parameters = inspect.signature(getattr(module, method)).parameters.values()
        forward.__signature__ = inspect.Signature([own, *parameters])  # type: ignore[attr-defined]
        return super().__new__(type(cls.__name__, (cls,), {"forward": forward}))

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module = module
        self.training = module.training


def model_from(source: str, module_class: Any, init_args: Mapping[str, Any], part: str, trust: bool) -> nn.Module:
    """A model with the content of a quantized file.

    Raises:
        ExportError: no class is given.
        CheckpointError: there is no such file, or it does not fit the class.
    """
    content = read_content(source)
    if module_class is None:
        raise ExportError(
            f"{source} holds the tensors of a model and not what to compute with them: give module_class "
            "(--model package.module:Class), the class it was made from"
        )
    content = content_of_part(content, part, source) if part else content
    model: nn.Module = load_content(content, as_factory(module_class), init_args, source, trust=trust)
    return model.eval()


def on_cpu(model: nn.Module) -> nn.Module:
    """The model, if it has quantized layers and is on the CPU; a copy there, if it is on another device.

    Raises:
        ModelError: it has no quantized layer, or weights without values.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if not isinstance(model, nn.Module):
        raise ModelError(f"export takes a quantized nn.Module or the path of a quantized file, not {type(model)}")
    if not any(isinstance(each, QuantizedLayer) for each in model.modules()):
        raise ModelError(
            f"{type(model).__name__} has no quantized layer: call tinyq_lightning.quantize(model, 'w8a8') first, or "
            "give the path of a quantized checkpoint"
        )
    devices = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    if "meta" in devices:
        raise ModelError(f"{type(model).__name__} has weights on the meta device: give it values before exporting it")
    return model if devices <= {"cpu"} else copy.deepcopy(model).to("cpu")


def rounding_noise(model: nn.Module) -> float:
    """How far two ways to compute the same model may be apart, relative to its output.

    Sums in another order differ in the last bits. Where activations are rounded to int8, some then go to the next step,
    and the layers after it see other inputs: measured on MiniLM, the outputs are apart by 0.05, near the error of 0.07
    that int8 activations have themselves.
    """
    coarse = any(METHODS[method].digits == 1 for method in methods_that_round(model))
    return _COARSE if coarse else 0.0


def methods_that_round(model: nn.Module) -> list[str]:
    """The methods of its layers that round activations."""
    methods = {each.method for each in model.modules() if isinstance(each, QuantizedLayer)}
    return sorted(method for method in methods if METHODS[method].rounds)


def callable_module(model: nn.Module, method: str) -> nn.Module:
    """What is called: the model, or one of its methods behind a ``forward``."""
    return model if method == "forward" else Method(model, method)
