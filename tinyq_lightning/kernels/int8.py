"""Which int8 product a layer takes, where the processor has one."""

from __future__ import annotations

import math
from typing import ClassVar

from typing_extensions import override

from tinyq_lightning.kernels.base import LONGEST_SUM, Choice, Kernel, LayerShape, WeightForm
from tinyq_lightning.kernels.fbgemm import FbgemmWeights, has_fbgemm_product
from tinyq_lightning.kernels.float16 import has_float16_product
from tinyq_lightning.kernels.float32 import FASTEST_WHERE_SMALL
from tinyq_lightning.kernels.integer import PlainWeights, has_cuda_product, has_plain_product, takes_integers
from tinyq_lightning.kernels.onednn import OnednnWeights, has_onednn_product
from tinyq_lightning.kernels.probe import has_amx
from tinyq_lightning.kernels.split import SplitWeights, has_split_product

__all__ = [
    "INT8",
    "has_int8_product",
]


def has_int8_product() -> bool:
    """Return True if this machine multiplies digits of any count by codes, fast and exactly."""
    return has_plain_product() or has_onednn_product()


# Layers of at least this many weights take packed codes, which are read a quarter sooner for 2 to 16 rows; smaller ones
# take plain codes, whose product costs less to call. Measured on AMD Zen 4 with AVX512-VNNI, one thread.
_PACKED_FROM = 1_000_000


# The same with AMX, where packed codes are multiplied twice as fast as plain ones if rows are many. Measured on an
# Intel Xeon, one thread.
_PACKED_FROM_WITH_AMX = 400_000


# Break-even of w8a32, whose three digits are three products: from this many multiply-adds (rows × weights) on it is
# faster than a float copy, for small layers and for those of at least 400,000 weights. The other methods round
# activations, and are no slower by their digits than by floats for any number of rows.
_PAYS_FROM, _MIDDLING, _PAYS_FROM_MIDDLING = 10_000_000, 400_000, 2_500_000


def _packed_from() -> int:
    return _PACKED_FROM_WITH_AMX if has_amx() else _PACKED_FROM


def _splits(layer: LayerShape) -> bool:
    return layer.method.digits == 1 and has_split_product()


class _Int8(Kernel):
    name = "int8"
    devices = frozenset({"cpu", "cuda"})
    forms: ClassVar[dict[str, type[WeightForm]]] = {
        "int8": PlainWeights,
        "int8-onednn": OnednnWeights,
        "int8-fbgemm": FbgemmWeights,
        "int8-split": SplitWeights,
    }
    instead = "exact"

    @override
    def lacks(self, layer: LayerShape) -> str:
        if layer.in_features > LONGEST_SUM:
            return f"sums over {layer.in_features:,} features can overflow int32"
        if layer.device == "cuda":
            return "" if has_cuda_product() else "no exact int8 product on this GPU"
        if not has_int8_product() and not _splits(layer):
            return "no fast and exact int8 product here"
        if layer.in_features < 2 and not has_onednn_product():
            return "the int8 product here is wrong for one feature"
        return ""

    @override
    def variant(self, layer: LayerShape) -> str:
        if layer.device == "cuda":
            return "int8-cuda"
        if not has_int8_product():
            return "int8-split"
        packed = "int8-onednn" if has_onednn_product() else ""
        if layer.method.digits == 1 and has_fbgemm_product() and not has_amx():  # FBGEMM has none for AMX
            packed = "int8-fbgemm"
        plain = takes_integers(layer.in_features) and (layer.weights < _packed_from() or not packed)
        return "int8" if plain else packed

    @override
    def fastest(self, layer: LayerShape, lacking: str) -> Choice | None:
        if layer.device == "cuda":
            return Choice("int8-cuda", "the GPU has int8 products") if layer.method.rounds else None
        if not has_int8_product():
            # The float16 product is faster for few rows, and no slower for many, at two bytes a weight; a float copy is
            # faster for small layers.
            wins = layer.compact or (not has_float16_product() and layer.weights >= _PACKED_FROM)
            return Choice("int8-split", "int8 products of digits in two parts") if wins else None
        variant, reason = self.variant(layer), "the processor has int8 products"
        if layer.method.rounds or layer.compact or layer.weights >= _packed_from():
            return Choice(variant, reason)
        if has_amx():  # three products of plain codes are slower there than one of floats, whatever the rows
            return Choice("float32", FASTEST_WHERE_SMALL)
        pays_from = _PAYS_FROM if layer.weights < _MIDDLING else _PAYS_FROM_MIDDLING
        few = f"{reason}; fewer rows than told go by a float copy in memory"
        return Choice(variant, few, math.ceil(pays_from / layer.weights), "float32")


INT8 = _Int8()
"""Exact products of int8 digits and int8 codes, plain or packed."""
