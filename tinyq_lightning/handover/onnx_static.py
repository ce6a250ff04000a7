"""Static activations: pairs of QuantizeLinear and DequantizeLinear around products, by ranges from calibration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyq_lightning.handover.onnx_nodes import constant, initializer, producer

if TYPE_CHECKING:
    import onnx_ir

__all__ = [
    "add_pairs",
    "static_places",
    "with_ranges",
]

_ACTIVATIONS = ("Relu", "Clip")
"""What runtimes fuse into the product before it, so that only its output is rounded."""

_SAME_RANGE = {"Flatten", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
"""What hands values on as they are, so that its output has the steps of its input."""

_CARRIED = {"Add", "AveragePool", "Concat", "GlobalAveragePool", "Relu", *_SAME_RANGE}
"""What runtimes compute on rounded values, if all inputs are rounded."""

_SHAPED = {"Reshape", "Squeeze", "Unsqueeze"}
"""Of these the first input is the data, and the second a shape or dimensions."""


@dataclass
class StaticPlaces:
    """Which tensors are rounded.

    Attributes:
        everywhere: those that everything reads rounded, with the tensor whose steps they take: the inputs and outputs
            of convolutions, and what lies between them.
        for_products: inputs of matrix products, which only these read rounded: other readers, such as the residual
            path of a transformer, would lose by it.
    """

    everywhere: dict[onnx_ir.Value, onnx_ir.Value] = field(default_factory=dict)
    for_products: dict[onnx_ir.Value, list[onnx_ir.Node]] = field(default_factory=dict)

    @property
    def values(self) -> list[onnx_ir.Value]:
        """All tensors whose ranges are wanted, once each."""
        return list(dict.fromkeys([*self.everywhere.values(), *self.for_products]))


def static_places(graph: onnx_ir.Graph) -> StaticPlaces:
    """Find the products of dequantized weights, and the tensors around them."""
    places = StaticPlaces()
    for node in graph:
        if not _multiplies_codes(node):
            continue
        assert node.inputs[0] is not None
        if node.op_type == "MatMul":
            places.for_products.setdefault(node.inputs[0], []).append(node)
        else:
            places.everywhere.setdefault(node.inputs[0], node.inputs[0])
            _round_output(places, node)
    for node in graph:
        if node.op_type in _CARRIED and node.outputs[0] not in places.everywhere:
            data = [value for value in node.inputs[: 1 if node.op_type in _SHAPED else None] if value is not None]
            if data and all(value in places.everywhere for value in data):
                _round_output(places, node)
    for node in graph:  # after all others, because a convolution's input may have been found before
        first = node.inputs[0] if node.inputs else None
        if node.op_type in _SAME_RANGE and first in places.everywhere and node.outputs[0] in places.everywhere:
            places.everywhere[node.outputs[0]] = places.everywhere[first]
    return places


def _multiplies_codes(node: onnx_ir.Node) -> bool:
    if node.domain != "" or node.op_type not in ("Conv", "MatMul") or constant(node.inputs[0]) is not None:
        return False
    dequantize = producer(node.inputs[1], "DequantizeLinear")
    return dequantize is not None and constant(dequantize.inputs[0]) is not None


def _round_output(places: StaticPlaces, node: onnx_ir.Node) -> None:
    """Round the output, or that of the activation function after it; outputs of the model stay as they are.

    So do those that are such an output in another shape: ONNX Runtime would move the pair behind the change of shape,
    and of int8 ones it (1.32) makes a node that it refuses itself.
    """
    value = node.outputs[0]
    uses = list(value.uses())
    fuses = node.op_type not in _SHAPED and len(uses) == 1 and uses[0].node.op_type in _ACTIVATIONS
    if fuses and not value.is_graph_output():
        value = uses[0].node.outputs[0]
    if not _is_handed_out(value):
        places.everywhere.setdefault(value, value)


def _is_handed_out(value: onnx_ir.Value) -> bool:
    """Whether the value is an output of the model, as it is or in another shape."""
    uses = list(value.uses())
    if value.is_graph_output() or len(uses) != 1 or uses[0].node.op_type not in _SAME_RANGE:
        return value.is_graph_output()
    return _is_handed_out(uses[0].node.outputs[0])


def with_ranges(model: onnx_ir.Model, values: Iterable[onnx_ir.Value]) -> onnx_ir.Model:
    """A copy of a model whose outputs are the smallest and the largest number of each value, in turn."""
    import onnx_ir

    copied = onnx_ir.from_proto(onnx_ir.to_proto(model))
    named = {value.name: value for value in _all_values(copied.graph)}
    copied.graph.outputs.clear()
    for index, value in enumerate(values):
        for operator in ("ReduceMin", "ReduceMax"):
            node = onnx_ir.node(operator, [named[value.name]], {"keepdims": 0})
            node.outputs[0].name = f"{operator}_{index}"
            node.outputs[0].dtype, node.outputs[0].shape = onnx_ir.DataType.FLOAT, onnx_ir.Shape(())
            copied.graph.append(node)
            copied.graph.outputs.append(node.outputs[0])
    return copied


def _all_values(graph: onnx_ir.Graph) -> list[onnx_ir.Value]:
    return [*graph.inputs, *(output for node in graph for output in node.outputs)]


def add_pairs(
    model: onnx_ir.Model,
    places: StaticPlaces,
    ranges: Mapping[onnx_ir.Value, tuple[float, float]],
    signed: bool,
) -> None:
    """Put a QuantizeLinear and a DequantizeLinear behind each place.

    Args:
        model: changed in place.
        places: of its graph.
        ranges: the smallest and the largest number of each value.
        signed: int8 with zero point 0, as TensorRT needs it; otherwise uint8 with any zero point, twice as fine for
            values of one sign.
    """
    graph = model.graph
    order = {value: index for index, value in enumerate(_all_values(graph))}
    steps: dict[onnx_ir.Value, tuple[onnx_ir.Value, onnx_ir.Value]] = {}
    for value in sorted({*places.everywhere, *places.for_products}, key=lambda each: order[each]):
        source = places.everywhere.get(value, value)
        if source not in steps:
            scale, zero_point = _step(ranges[source], signed)
            name = f"{source.name}_step"
            steps[source] = initializer(graph, name, scale), initializer(graph, f"{name}_zero", zero_point)
        readers = [(use.node, use.idx) for use in value.uses()]
        if value not in places.everywhere:
            readers = [(node, 0) for node in places.for_products[value]]
        rounded = _pair(graph, value, *steps[source])
        for node, index in readers:
            node.replace_input_with(index, rounded)


def _pair(graph: onnx_ir.Graph, value: onnx_ir.Value, scale: onnx_ir.Value, zero: onnx_ir.Value) -> onnx_ir.Value:
    import onnx_ir

    quantize = onnx_ir.node("QuantizeLinear", [value, scale, zero])
    dequantize = onnx_ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero])
    quantize.outputs[0].name, dequantize.outputs[0].name = f"{value.name}_rounded", f"{value.name}_again"
    quantize.outputs[0].type, dequantize.outputs[0].type = zero.type, value.type
    quantize.outputs[0].shape = dequantize.outputs[0].shape = value.shape
    source = value.producer()
    if source is None:
        graph.insert_before(graph[0], [quantize, dequantize])
    else:
        graph.insert_after(source, [quantize, dequantize])
    return dequantize.outputs[0]


def _step(bounds: tuple[float, float], signed: bool) -> tuple[Any, Any]:
    """Scale float32 and zero point of a range; zero is a whole number of steps."""
    low, high = min(bounds[0], 0.0), max(bounds[1], 0.0)
    if signed:
        return np.float32(max(high, -low) / 127 or 1.0), np.int8(0)
    scale = (high - low) / 255 or 1.0
    return np.float32(scale), np.uint8(np.clip(round(-low / scale), 0, 255))
