"""Post-training int8 quantization for people who train with PyTorch Lightning."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from tinyq_lightning.errors import TinyQError
from tinyq_lightning.file import QuantizedCheckpointMixin, load_quantized
from tinyq_lightning.handover import ExportReport, export
from tinyq_lightning.kernels import w8_a8_forward, w8_a16_forward, w8_a32_forward
from tinyq_lightning.layers import W8A8LinearLayer, W8A16LinearLayer, W8A32LinearLayer, attention
from tinyq_lightning.plan import Decision, Plan, quantize, quantized
from tinyq_lightning.quantizer import Quantizer, replace_linear_with_target_and_quantize
from tinyq_lightning.spec import QuantizationSpec
from tinyq_lightning.version import __version__

if TYPE_CHECKING:
    from tinyq_lightning.callback import TinyQCallback
    from tinyq_lightning.report import QuantizedModelSummary, summarize

# Lightning takes seconds to import, so the names that need it are looked up when they are first touched.
_LIGHTNING_NAMES = {
    "TinyQCallback": "tinyq_lightning.callback",
    "QuantizedModelSummary": "tinyq_lightning.report",
    "summarize": "tinyq_lightning.report",
}

# The former module of QuantizedMultiheadAttention: pickles of whole modules name it.
sys.modules[f"{__name__}.attention"] = attention

__all__ = [
    "Decision",
    "ExportReport",
    "Plan",
    "QuantizationSpec",
    "QuantizedCheckpointMixin",
    "QuantizedModelSummary",
    "Quantizer",
    "TinyQCallback",
    "TinyQError",
    "W8A8LinearLayer",
    "W8A16LinearLayer",
    "W8A32LinearLayer",
    "__version__",
    "export",
    "load_quantized",
    "quantize",
    "quantized",
    "replace_linear_with_target_and_quantize",
    "summarize",
    "w8_a8_forward",
    "w8_a16_forward",
    "w8_a32_forward",
]


def __getattr__(name: str) -> Any:
    if name in _LIGHTNING_NAMES:
        return getattr(importlib.import_module(_LIGHTNING_NAMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
