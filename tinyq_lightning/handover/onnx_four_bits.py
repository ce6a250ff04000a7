"""Codes of four bits in a graph: int4 initializers, which runtimes multiply by, or expand when they load them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from tinyq_lightning.handover.onnx_nodes import constant, initializer
from tinyq_lightning.kernels import GROUP, multipliers_of
from tinyq_lightning.layers import Int8Weight

if TYPE_CHECKING:
    import onnx_ir

__all__ = [
    "pack_four_bits",
]


@dataclass(frozen=True)
class _Codes:
    """A weight of four bits as it stands in a graph.

    Attributes:
        multipliers: ``[groups, out]`` or ``[out, groups]`` uint8.
        axis: along which the groups lie: 0 of ``[in, out]``; 1 of ``[out, in]``, and of more dimensions all but the
            first, one after the other.
    """

    multipliers: Any
    axis: int


def pack_four_bits(model: onnx_ir.Model, module: nn.Module, expands: bool) -> None:
    """Store the codes of four-bit layers as int4 instead of as the int8 numbers that they stand for.

    The weights of a MatMul become a DequantizeLinear of blocks. Other codes are multiplied with their multipliers by
    operators of constants alone, which ONNX Runtime computes once, when it loads the file: then it has the int8 codes.
    Rows that are not whole groups stay int8.

    Args:
        model: a tidied graph; changed in place.
        module: what it was made from.
        expands: whether the runtime computes constants when it loads them; if not, other codes stay int8.
    """
    known = _known(module)
    if not known:
        return
    for value in list(model.graph.initializers.values()):
        codes = constant(value)
        found = known.get(_digest(codes)) if codes is not None and codes.dtype == np.int8 else None
        if found is None:
            continue
        if _is_multiplied(value, found):
            _into_blocks(model.graph, value, codes, found)
        elif expands:
            _expanded_on_loading(model.graph, value, codes, found)


def _known(module: nn.Module) -> Mapping[bytes, _Codes]:
    """The weights of four bits, by their codes as they may stand in a graph: as they are, or transposed."""
    found: dict[bytes, _Codes] = {}
    for layer in module.modules():
        codes, _, packed = layer.tensors() if isinstance(layer, Int8Weight) else (None, None, None)
        if codes is None or packed is None or len(codes) != len(packed) or not codes.numel():
            continue
        if codes[0].numel() % GROUP:  # OpenVINO takes whole groups alone
            continue
        multipliers = multipliers_of(packed, codes[0].numel()).numpy()
        found[_digest(codes.numpy())] = _Codes(multipliers, 1)
        if codes.dim() == 2:
            found[_digest(codes.t().numpy())] = _Codes(multipliers.T, 0)
    return found


def _digest(codes: Any) -> bytes:
    return hashlib.blake2b(repr(codes.shape).encode() + np.ascontiguousarray(codes).tobytes()).digest()


def _is_multiplied(value: onnx_ir.Value, found: _Codes) -> bool:
    """Whether nothing reads the codes but a DequantizeLinear of columns, and this nothing but matrix products."""
    readers = [use.node for use in value.uses()]
    products = [use.node.op_type for node in readers for use in node.outputs[0].uses()]
    return (
        found.axis == 0
        and {node.op_type for node in readers} == {"DequantizeLinear"}
        and all(len(node.inputs) == 2 and constant(node.inputs[1]) is not None for node in readers)
        and set(products) == {"MatMul"}
    )


def _into_blocks(graph: onnx_ir.Graph, value: onnx_ir.Value, codes: Any, found: _Codes) -> None:
    import onnx_ir

    factors = np.repeat(found.multipliers, GROUP, 0).astype(np.int8)
    held = _narrow(graph, f"{value.name}_int4", codes // factors, onnx_ir.DataType.INT4)
    for node in [use.node for use in value.uses()]:
        scales = constant(node.inputs[1])
        steps = initializer(graph, f"{node.outputs[0].name}_steps", (found.multipliers * scales).astype(np.float32))
        blocks = onnx_ir.node("DequantizeLinear", [held, steps], {"axis": 0, "block_size": GROUP})
        _replace(graph, node, blocks)
    del graph.initializers[str(value.name)]


def _expanded_on_loading(graph: onnx_ir.Graph, value: onnx_ir.Value, codes: Any, found: _Codes) -> None:
    import onnx_ir

    shape = list(found.multipliers.shape)
    shape.insert(found.axis + 1, GROUP)
    factors = np.expand_dims(found.multipliers, found.axis + 1)
    narrow = codes.reshape(shape) // factors.astype(np.int8)
    held = _narrow(graph, f"{value.name}_int4", narrow, onnx_ir.DataType.INT4)
    times = _narrow(graph, f"{value.name}_multipliers", factors, onnx_ir.DataType.UINT4)
    sizes = initializer(graph, f"{value.name}_shape", np.array(codes.shape))
    integer, byte = {"to": int(onnx_ir.DataType.INT32)}, {"to": int(onnx_ir.DataType.INT8)}
    wide = [onnx_ir.node("Cast", [each], integer) for each in (held, times)]
    product = onnx_ir.node("Mul", [each.outputs[0] for each in wide])
    small = onnx_ir.node("Cast", [product.outputs[0]], byte)
    whole = onnx_ir.node("Reshape", [small.outputs[0], sizes])
    whole.outputs[0].type, whole.outputs[0].shape = value.type, value.shape
    for index, node in enumerate((*wide, product, small, whole)):
        node.outputs[0].name = f"{value.name}_expanded_{index}"
    uses = list(value.uses())
    graph.insert_before(graph[0], [*wide, product, small, whole])
    for use in uses:
        use.node.replace_input_with(use.idx, whole.outputs[0])
    del graph.initializers[str(value.name)]


def _narrow(graph: onnx_ir.Graph, name: str, values: Any, kind: onnx_ir.DataType) -> onnx_ir.Value:
    return initializer(graph, name, values.astype(kind.numpy()))


def _replace(graph: onnx_ir.Graph, old: onnx_ir.Node, new: onnx_ir.Node) -> None:
    former, output = old.outputs[0], new.outputs[0]
    output.type, output.shape, output.name = former.type, former.shape, f"{former.name}_blocks"
    graph.insert_before(old, new)
    for use in list(former.uses()):
        use.node.replace_input_with(use.idx, output)
    graph.remove(old, safe=True)
