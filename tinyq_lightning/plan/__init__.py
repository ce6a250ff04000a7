"""What happens to each layer of one model, and why: a spec resolved against it into a ``Plan``, and carried out."""

from tinyq_lightning.plan.coverage import Coverage, file_coverage, model_coverage
from tinyq_lightning.plan.heap import return_freed_memory
from tinyq_lightning.plan.make_layers import QuantizedLayers, dress, refuse_root
from tinyq_lightning.plan.plan import Decision, Plan, state_bytes
from tinyq_lightning.plan.replace import carry_out, put_in, quantize, quantize_by_layer, quantized
from tinyq_lightning.plan.resolve import Present, check_patterns, resolve
from tinyq_lightning.plan.sites import Site, find_sites, is_layer
from tinyq_lightning.plan.swap import Swap

__all__ = [
    "Coverage",
    "Decision",
    "Plan",
    "Present",
    "QuantizedLayers",
    "Site",
    "Swap",
    "carry_out",
    "check_patterns",
    "dress",
    "file_coverage",
    "find_sites",
    "is_layer",
    "model_coverage",
    "put_in",
    "quantize",
    "quantize_by_layer",
    "quantized",
    "refuse_root",
    "resolve",
    "return_freed_memory",
    "state_bytes",
]
