"""Models of Hugging Face whose layers are quantized: their ``save_pretrained`` says what to do.

It would write int8 codes under names that ``from_pretrained`` does not know, and that would fill the layers with random
weights. transformers asks ``hf_quantizer`` of a model whether it can be saved, and refuses by its method's name. PEFT
asks nothing: if an adapter is quantized, the method of the model is replaced.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, NoReturn

from torch import nn

from tinyq_lightning.errors import ModelError
from tinyq_lightning.layers import QuantizedLayer

__all__ = [
    "refuse_save_pretrained",
]

_METHOD = (
    "tinyq_lightning, whose files load_quantized reads (to write a folder that from_pretrained reads: "
    "tinyq_lightning.export(model, folder, inputs, to='compressed-tensors'))"
)


class RefusesSaving:
    """What transformers takes for the quantizer of a model."""

    quantization_config: ClassVar[Any] = SimpleNamespace(quant_method=_METHOD)
    is_compileable = True
    is_trainable = is_qat_trainable = False

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Return False, whatever is asked."""
        return False


def refuse_save_pretrained(model: nn.Module) -> None:
    """Have the models of Hugging Face in ``model`` refuse ``save_pretrained``; they are known by the class's name.

    A model of PEFT saves its adapters alone, so it refuses if one of those is quantized.
    """
    for module in model.modules():
        if _is_of("transformers", "PreTrainedModel", module) and getattr(module, "hf_quantizer", None) is None:
            module.hf_quantizer = RefusesSaving()  # type: ignore[assignment]
        elif _is_of("peft", "PeftModel", module) and (adapter := _quantized_adapter(module)):
            vars(module)["save_pretrained"] = partial(_refuse_adapter, adapter)


def _is_of(package: str, name: str, module: nn.Module) -> bool:
    return any(each.__name__ == name and each.__module__.partition(".")[0] == package for each in type(module).__mro__)


def _quantized_adapter(model: Any) -> str | None:
    """The name of an adapter that has a quantized layer; PEFT keeps the parts of adapters in dicts by their names."""
    for each in model.modules():
        for name in each if isinstance(each, nn.ModuleDict) else ():
            if name in model.peft_config and any(isinstance(part, QuantizedLayer) for part in each[name].modules()):
                return str(name)
    return None


def _refuse_adapter(adapter: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise ModelError(
        f"save_pretrained would write the codes of adapter {adapter!r} under names that PEFT does not load: save it "
        f"before quantizing, or leave adapters float with exclude=['*.{adapter}*']. load_quantized reads the files of "
        "the whole model"
    )
