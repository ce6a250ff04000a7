"""The former module of QuantizedMultiheadAttention: pickles of whole modules name it."""

from tinyq_lightning.layers import QuantizedMultiheadAttention, in_projections, linear_with

__all__ = [
    "QuantizedMultiheadAttention",
    "in_projections",
    "linear_with",
]
