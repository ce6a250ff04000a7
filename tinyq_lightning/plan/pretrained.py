"""Models of Hugging Face whose layers are quantized: their ``save_pretrained`` says what to do.

It would write int8 codes under names that ``from_pretrained`` does not know, and that would fill the layers with random
weights. transformers asks ``hf_quantizer`` of a model whether it can be saved, and refuses by its method's name.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

from torch import nn

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
    """Have the models of Hugging Face in ``model`` refuse ``save_pretrained``; they are known by the class's name."""
    for module in model.modules():
        if _is_pretrained(module) and getattr(module, "hf_quantizer", None) is None:
            module.hf_quantizer = RefusesSaving()  # type: ignore[assignment]


def _is_pretrained(module: nn.Module) -> bool:
    return any(
        each.__name__ == "PreTrainedModel" and each.__module__.partition(".")[0] == "transformers"
        for each in type(module).__mro__
    )
