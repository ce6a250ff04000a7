"""Reads and changes the nodes of an ONNX graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir

__all__ = [
    "constant",
    "initializer",
    "producer",
    "replace_uses",
]


def producer(value: onnx_ir.Value | None, operator: str) -> onnx_ir.Node | None:
    """The node that computes ``value``, if it is one of this operator."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type == operator else None


def constant(value: onnx_ir.Value | None) -> Any:
    """The values of an initializer as a NumPy array; None for anything else."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value.const_value.numpy()


def initializer(graph: onnx_ir.Graph, name: str, values: Any) -> onnx_ir.Value:
    """A new initializer with values of NumPy."""
    import onnx_ir

    tensor = onnx_ir.tensor(values, name=name)
    shape = onnx_ir.Shape(values.shape)
    value = onnx_ir.Value(name=name, const_value=tensor, type=onnx_ir.TensorType(tensor.dtype), shape=shape)
    graph.register_initializer(value)
    return value


def replace_uses(graph: onnx_ir.Graph, old: onnx_ir.Value, new: onnx_ir.Value) -> None:
    """Have everything that reads ``old`` read ``new``, also the outputs of the graph, which keep their names."""
    new.type, new.shape = old.type, old.shape
    for use in list(old.uses()):
        use.node.replace_input_with(use.idx, new)
    for place, output in enumerate(graph.outputs):
        if output is old:
            name, old.name = old.name, None
            new.name = name
            graph.outputs[place] = new
