"""Circular padding written as slices and Concat, for runtimes that lack the mode ``wrap`` of Pad."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tinyq_lightning.handover.onnx_nodes import constant, initializer, replace_uses

if TYPE_CHECKING:
    import onnx_ir

__all__ = [
    "spell_out_wrapped_pads",
]

_TO_THE_END = np.iinfo(np.int64).max


def spell_out_wrapped_pads(model: onnx_ir.Model) -> None:
    """Replace each Pad that repeats its input at both ends, by constant widths, by what it means."""
    for node in list(model.graph):
        if node.op_type == "Pad" and node.domain == "" and node.attributes.get_string("mode", "constant") == "wrap":
            _spell_out(model.graph, node)


def _spell_out(graph: onnx_ir.Graph, pad: onnx_ir.Node) -> None:
    widths, axes = constant(pad.inputs[1]), constant(pad.inputs[3]) if len(pad.inputs) > 3 else None
    padded = pad.inputs[0]
    if widths is None or padded is None or (widths < 0).any() or (len(pad.inputs) > 3 and axes is None):
        return
    count = len(widths) // 2
    for axis, begin, end in zip(range(count) if axes is None else axes, widths[:count], widths[count:], strict=True):
        parts = [padded]
        if begin:
            parts.insert(0, _slice(graph, pad, padded, int(axis), -int(begin), _TO_THE_END))
        if end:
            parts.append(_slice(graph, pad, padded, int(axis), 0, int(end)))
        if len(parts) > 1:
            padded = _inserted(graph, pad, "Concat", parts, axis=int(axis))
    replace_uses(graph, pad.outputs[0], padded)
    graph.remove([pad], safe=True)


def _slice(
    graph: onnx_ir.Graph, pad: onnx_ir.Node, value: onnx_ir.Value, axis: int, start: int, end: int
) -> onnx_ir.Value:
    """The places ``start`` to ``end`` of a dimension."""
    named = {f"{pad.name}_{axis}_{start}_{end}_{which}": each for which, each in enumerate((start, end, axis))}
    bounds = [initializer(graph, name, np.array([each], dtype=np.int64)) for name, each in named.items()]
    return _inserted(graph, pad, "Slice", [value, *bounds])


def _inserted(
    graph: onnx_ir.Graph, pad: onnx_ir.Node, operator: str, inputs: list[onnx_ir.Value], **attributes: int
) -> onnx_ir.Value:
    """The output of a new node before ``pad``."""
    import onnx_ir

    node = onnx_ir.node(operator, inputs, attributes)
    node.outputs[0].type = pad.outputs[0].type
    graph.insert_before(pad, node)
    return node.outputs[0]
