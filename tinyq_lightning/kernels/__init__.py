"""Quantized forward pass functions: pure functions on tensors, and the choice among kernels."""

from tinyq_lightning.kernels.autocast import autocast_dtype
from tinyq_lightning.kernels.base import LONGEST_SUM, Choice, CodeHolder, TensorSnapshot, WeightForm, version_of
from tinyq_lightning.kernels.choice import FORMS, choose_kernel, wanted_kernel, weight_form
from tinyq_lightning.kernels.conv_choice import (
    CONV_FORMS,
    ConvShape,
    choose_convolution,
    convolve_once,
    packed_convolution,
)
from tinyq_lightning.kernels.conv_forms import ConvForm, FloatConvWeights
from tinyq_lightning.kernels.conv_layout import LAYOUTS, is_channels_last, layout_of
from tinyq_lightning.kernels.conv_onednn import has_int8_convolution
from tinyq_lightning.kernels.convolution import ConvFormulaName, Geometry, convolve, output_sizes, quantized_convolution
from tinyq_lightning.kernels.error_feedback import feedback_codes
from tinyq_lightning.kernels.fbgemm_rows import FbgemmRows, has_fbgemm_rows
from tinyq_lightning.kernels.float16 import has_float16_product
from tinyq_lightning.kernels.float32 import Float32Weights
from tinyq_lightning.kernels.formula import (
    FormulaName,
    quantized_linear,
    w8_a8_forward,
    w8_a16_forward,
    w8_a32_forward,
)
from tinyq_lightning.kernels.four_bits import quantize_groups_expanded, quantize_groups_with_sqnr
from tinyq_lightning.kernels.int4 import NibbleWeights
from tinyq_lightning.kernels.int8 import has_int8_product
from tinyq_lightning.kernels.integer import takes_integers
from tinyq_lightning.kernels.lookup import choose_lookup_kernel
from tinyq_lightning.kernels.moments import Moments, moments_bytes
from tinyq_lightning.kernels.nibbles import GROUP, collapse, expand, four_bit_bytes, multipliers_of, packed_shapes
from tinyq_lightning.kernels.onednn import compiles_packed_product, holds_packed_constants, packing_in_graphs
from tinyq_lightning.kernels.packed import INPUT_DTYPES, packed_linear
from tinyq_lightning.kernels.recurrent import choose_recurrent_kernel
from tinyq_lightning.kernels.tracing import (
    count_modes,
    exporting_for_this_processor,
    in_functional_call,
    in_functorch,
    in_jit_trace,
    in_transform,
    is_exporting,
    is_exporting_for_any_processor,
    is_mapped,
    is_recorded,
    is_same_memory,
    outside_modes,
)
from tinyq_lightning.kernels.weights import (
    count_non_finite,
    dequantize,
    joint_sqnr_db,
    quantize_per_row,
    quantize_per_row_with_sqnr,
    weight_sqnr_db,
)

__all__ = [
    "CONV_FORMS",
    "FORMS",
    "GROUP",
    "INPUT_DTYPES",
    "LAYOUTS",
    "LONGEST_SUM",
    "Choice",
    "CodeHolder",
    "ConvForm",
    "ConvFormulaName",
    "ConvShape",
    "FbgemmRows",
    "Float32Weights",
    "FloatConvWeights",
    "FormulaName",
    "Geometry",
    "Moments",
    "NibbleWeights",
    "TensorSnapshot",
    "WeightForm",
    "autocast_dtype",
    "choose_convolution",
    "choose_kernel",
    "choose_lookup_kernel",
    "choose_recurrent_kernel",
    "collapse",
    "compiles_packed_product",
    "convolve",
    "convolve_once",
    "count_modes",
    "count_non_finite",
    "dequantize",
    "expand",
    "exporting_for_this_processor",
    "feedback_codes",
    "four_bit_bytes",
    "has_fbgemm_rows",
    "has_float16_product",
    "has_int8_convolution",
    "has_int8_product",
    "holds_packed_constants",
    "in_functional_call",
    "in_functorch",
    "in_jit_trace",
    "in_transform",
    "is_channels_last",
    "is_exporting",
    "is_exporting_for_any_processor",
    "is_mapped",
    "is_recorded",
    "is_same_memory",
    "joint_sqnr_db",
    "layout_of",
    "moments_bytes",
    "multipliers_of",
    "output_sizes",
    "outside_modes",
    "packed_convolution",
    "packed_linear",
    "packed_shapes",
    "packing_in_graphs",
    "quantize_groups_expanded",
    "quantize_groups_with_sqnr",
    "quantize_per_row",
    "quantize_per_row_with_sqnr",
    "quantized_convolution",
    "quantized_linear",
    "takes_integers",
    "version_of",
    "w8_a8_forward",
    "w8_a16_forward",
    "w8_a32_forward",
    "wanted_kernel",
    "weight_form",
    "weight_sqnr_db",
]
