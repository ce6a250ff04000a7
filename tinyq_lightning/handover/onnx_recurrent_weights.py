"""Weights of recurrent operators in float32, for a runtime that takes no others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinyq_lightning.handover.onnx_nodes import constant, initializer, producer

if TYPE_CHECKING:
    import onnx_ir

__all__ = [
    "expand_recurrent",
]

_RECURRENT = ("GRU", "LSTM", "RNN")


def expand_recurrent(model: onnx_ir.Model) -> bool:
    """Replace the DequantizeLinear of each weight of a recurrent operator by its values.

    Returns:
        Whether there was one.
    """
    from onnx_ir.passes import common

    found = False
    for node in model.graph:
        for place in (1, 2) if node.op_type in _RECURRENT and node.domain == "" else ():
            found |= _expand(model.graph, node, place)
    if found:
        common.RemoveUnusedNodesPass()(model)
    return found


def _expand(graph: onnx_ir.Graph, node: onnx_ir.Node, place: int) -> bool:
    shaped = producer(node.inputs[place], "Reshape")
    dequantize = producer(node.inputs[place] if shaped is None else shaped.inputs[0], "DequantizeLinear")
    if dequantize is None:
        return False
    codes, scales = (constant(value) for value in dequantize.inputs[:2])
    weight = node.inputs[place]
    if codes is None or scales is None or weight is None or weight.shape is None:
        return False
    values = (codes * scales[:, None]).reshape(weight.shape.numpy())
    node.replace_input_with(place, initializer(graph, f"{node.name}_{node.op_type}_weight_{place}", values))
    return True
