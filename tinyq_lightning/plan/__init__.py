"""What happens to each layer of one model, and why: a spec resolved against it into a ``Plan``, and carried out."""

from tinyq_lightning.plan.checks import check_model, check_patterns, refuse_root, sites_for
from tinyq_lightning.plan.coverage import Coverage, file_coverage
from tinyq_lightning.plan.functions import globals_read
from tinyq_lightning.plan.groups import group_name, grouped
from tinyq_lightning.plan.heap import return_freed_memory
from tinyq_lightning.plan.make_layers import QuantizedLayers, carry_over, quantized_weights
from tinyq_lightning.plan.plan import MANY_LAYERS, DecidedBy, Decision, OtherWeight, Plan, state_bytes
from tinyq_lightning.plan.pretrained import refuse_save_pretrained
from tinyq_lightning.plan.recoded import Recoded
from tinyq_lightning.plan.replace import carry_out, put_in, quantize_by_layer, quantized, warn_of_unkept
from tinyq_lightning.plan.resolution import WithValues, resolve
from tinyq_lightning.plan.sites import Site, find_sites, is_metric
from tinyq_lightning.plan.swap import Swap
from tinyq_lightning.plan.ties import weights_of
from tinyq_lightning.plan.why_float import why_not_replaced, why_stays_float
from tinyq_lightning.plan.wrappers import unwrapped, users_path

__all__ = [
    "MANY_LAYERS",
    "Coverage",
    "DecidedBy",
    "Decision",
    "OtherWeight",
    "Plan",
    "QuantizedLayers",
    "Recoded",
    "Site",
    "Swap",
    "WithValues",
    "carry_out",
    "carry_over",
    "check_model",
    "check_patterns",
    "file_coverage",
    "find_sites",
    "globals_read",
    "group_name",
    "grouped",
    "is_metric",
    "put_in",
    "quantize_by_layer",
    "quantized",
    "quantized_weights",
    "refuse_root",
    "refuse_save_pretrained",
    "resolve",
    "return_freed_memory",
    "sites_for",
    "state_bytes",
    "unwrapped",
    "users_path",
    "warn_of_unkept",
    "weights_of",
    "why_not_replaced",
    "why_stays_float",
]
