"""Folds batch norms into the scales and the biases of the convolutions before them; codes change their sign at most."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tinyq_lightning.handover.onnx_nodes import constant, initializer, producer, replace_uses

if TYPE_CHECKING:
    import onnx_ir

__all__ = [
    "fold_norms",
]

_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
"""Of a channel that a norm multiplies by zero: scales are positive."""


def fold_norms(model: onnx_ir.Model) -> None:
    """Fold each norm whose only input is a convolution of dequantized weights that nothing else reads."""
    for node in list(model.graph):
        if node.op_type == "BatchNormalization" and node.attributes.get_int("training_mode", 0) == 0:
            _fold(model.graph, node)


def _fold(graph: onnx_ir.Graph, norm: onnx_ir.Node) -> None:
    import onnx_ir

    conv = producer(norm.inputs[0], "Conv") or producer(norm.inputs[0], "ConvTranspose")
    if conv is None or len(list(conv.outputs[0].uses())) != 1 or conv.outputs[0].is_graph_output():
        return
    dequantize = producer(conv.inputs[1], "DequantizeLinear")
    statistics = [constant(value) for value in norm.inputs[1:]]
    added = constant(conv.inputs[2]) if len(conv.inputs) > 2 and conv.inputs[2] is not None else np.float32(0)
    if dequantize is None or added is None or any(each is None for each in statistics):
        return
    codes, scales = (constant(value) for value in dequantize.inputs[:2])
    if codes is None or scales is None:
        return
    axis = dequantize.attributes.get_int("axis", 1)
    gain, offset, mean, variance = (each.astype(np.float64) for each in statistics)
    factor = gain / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
    new_scales = np.maximum(np.abs(factor) * scales, _SMALLEST_SCALE).astype(np.float32)
    bias = ((added - mean) * factor + offset).astype(np.float32)
    held, weight = dequantize.inputs[0], conv.inputs[1]
    assert held is not None
    assert weight is not None
    if (factor < 0).any():
        sign = np.where(factor < 0, -1, 1).astype(np.int8)
        shape = [-1 if place == axis else 1 for place in range(codes.ndim)]
        held = initializer(graph, f"{held.name}_folded_{norm.name}", codes * sign.reshape(shape))
    inputs = [held, initializer(graph, f"{norm.name}_scales", new_scales)]
    folded = onnx_ir.node("DequantizeLinear", inputs, {"axis": axis})
    folded.outputs[0].dtype, folded.outputs[0].shape = onnx_ir.DataType.FLOAT, weight.shape
    graph.insert_before(conv, folded)
    moved = onnx_ir.Node(
        "",
        conv.op_type,
        [conv.inputs[0], folded.outputs[0], initializer(graph, f"{norm.name}_bias", bias)],
        list(conv.attributes.values()),
        name=conv.name,
    )
    graph.insert_before(conv, moved)
    replace_uses(graph, norm.outputs[0], moved.outputs[0])
    graph.remove([norm, conv], safe=True)
