"""Post-training int8 and int4 quantization for people who train with PyTorch Lightning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tinyq_lightning.errors import TinyQError
from tinyq_lightning.version import __version__

if TYPE_CHECKING:
    from tinyq_lightning.callback import TinyQCallback
    from tinyq_lightning.file import QuantizedCheckpointMixin, load_quantized
    from tinyq_lightning.handover import ExportReport, export
    from tinyq_lightning.kernels import w8_a8_forward, w8_a16_forward, w8_a32_forward
    from tinyq_lightning.layers import (
        W4A8LinearLayer,
        W4A16LinearLayer,
        W4A32LinearLayer,
        W8A8LinearLayer,
        W8A16LinearLayer,
        W8A32LinearLayer,
    )
    from tinyq_lightning.plan import Decision, Plan, quantized
    from tinyq_lightning.quantizer import Quantizer, replace_linear_with_target_and_quantize
    from tinyq_lightning.report import QuantizedModelSummary, summarize
    from tinyq_lightning.search import quantize
    from tinyq_lightning.spec import QuantizationSpec

# torch and Lightning take seconds to import, so names are looked up when they are first touched.
_MODULES = {
    "Decision": "plan",
    "ExportReport": "handover",
    "Plan": "plan",
    "QuantizationSpec": "spec",
    "QuantizedCheckpointMixin": "file",
    "QuantizedModelSummary": "report",
    "Quantizer": "quantizer",
    "TinyQCallback": "callback",
    "W4A8LinearLayer": "layers",
    "W4A16LinearLayer": "layers",
    "W4A32LinearLayer": "layers",
    "W8A8LinearLayer": "layers",
    "W8A16LinearLayer": "layers",
    "W8A32LinearLayer": "layers",
    "export": "handover",
    "load_quantized": "file",
    "quantize": "search",
    "quantized": "plan",
    "replace_linear_with_target_and_quantize": "quantizer",
    "summarize": "report",
    "w8_a8_forward": "kernels",
    "w8_a16_forward": "kernels",
    "w8_a32_forward": "kernels",
}

# Their bases are Lightning's classes, of the packages that are imported at the time.
_OF_BOTH = {"QuantizedModelSummary", "TinyQCallback"}

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
    "W4A8LinearLayer",
    "W4A16LinearLayer",
    "W4A32LinearLayer",
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
    if name in _MODULES:
        found = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        if name in _OF_BOTH:
            importlib.import_module(f"{__name__}.namespaces").take_imported()
        else:
            globals()[name] = found
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
