"""Modules that hold int8 codes, and the table of the kinds of layer that they replace."""

from tinyq_lightning.layers.attention import QuantizedMultiheadAttention, in_projections, linear_with
from tinyq_lightning.layers.computed import float_weight, sources_of, why_fixed
from tinyq_lightning.layers.conv import QuantizedConv
from tinyq_lightning.layers.embedding import QuantizedEmbedding, QuantizedEmbeddingBag, ScaledQuantizedEmbedding
from tinyq_lightning.layers.four_bit_state import why_not_packed
from tinyq_lightning.layers.int8_weight import Int8Weight
from tinyq_lightning.layers.kind import Candidate, Kind, WeightSize, first_tensor
from tinyq_lightning.layers.kinds import KINDS, has_inner_layers, is_replaceable, kind_of, methods_of, why_closed
from tinyq_lightning.layers.linear import (
    LAYERS,
    QuantizedLinear,
    W4A8LinearLayer,
    W4A16LinearLayer,
    W4A32LinearLayer,
    W8A8LinearLayer,
    W8A16LinearLayer,
    W8A32LinearLayer,
)
from tinyq_lightning.layers.matrix import Int8Matrix, MatrixKind, MatrixPlace, bare_matrix
from tinyq_lightning.layers.quantized_layer import QuantizedLayer
from tinyq_lightning.layers.recurrent import (
    QuantizedGRU,
    QuantizedGRUCell,
    QuantizedLSTM,
    QuantizedLSTMCell,
    QuantizedRecurrent,
    QuantizedRNN,
    QuantizedRNNCell,
)
from tinyq_lightning.layers.weight_hooks import without_weight_hooks
from tinyq_lightning.layers.why_float import static_functions

__all__ = [
    "KINDS",
    "LAYERS",
    "Candidate",
    "Int8Matrix",
    "Int8Weight",
    "Kind",
    "MatrixKind",
    "MatrixPlace",
    "QuantizedConv",
    "QuantizedEmbedding",
    "QuantizedEmbeddingBag",
    "QuantizedGRU",
    "QuantizedGRUCell",
    "QuantizedLSTM",
    "QuantizedLSTMCell",
    "QuantizedLayer",
    "QuantizedLinear",
    "QuantizedMultiheadAttention",
    "QuantizedRNN",
    "QuantizedRNNCell",
    "QuantizedRecurrent",
    "ScaledQuantizedEmbedding",
    "W4A8LinearLayer",
    "W4A16LinearLayer",
    "W4A32LinearLayer",
    "W8A8LinearLayer",
    "W8A16LinearLayer",
    "W8A32LinearLayer",
    "WeightSize",
    "bare_matrix",
    "first_tensor",
    "float_weight",
    "has_inner_layers",
    "in_projections",
    "is_replaceable",
    "kind_of",
    "linear_with",
    "methods_of",
    "sources_of",
    "static_functions",
    "why_closed",
    "why_fixed",
    "why_not_packed",
    "without_weight_hooks",
]
