"""Tidies a graph: codes stay codes, whatever only moves them is done once, and norms that follow them are folded in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tinyq_lightning.handover.onnx_norms import fold_norms
from tinyq_lightning.handover.onnx_padding import spell_out_wrapped_pads

if TYPE_CHECKING:
    import onnx_ir

__all__ = [
    "tidy",
]

_MOVES = {"Transpose", "Slice", "Split", "Concat", "Reshape", "Unsqueeze", "Squeeze", "Identity"}

_SMALL = 64
"""Values of a constant that are computed with, such as shapes; anything larger may be a weight."""


def tidy(model: onnx_ir.Model) -> None:
    """Fold constants, but leave codes and what dequantizes them; drop what is not used, and all names of origins."""
    from onnx_ir.passes import common
    from onnxscript.optimizer import optimize_ir

    _drop_origins(model)
    optimize_ir(model, should_fold=_folds, input_size_limit=2**31, output_size_limit=2**62)
    fold_norms(model)
    spell_out_wrapped_pads(model)
    _lay_out(model)
    for each in (common.DeduplicateHashedInitializersPass(), common.RemoveUnusedNodesPass()):
        each(model)


def _lay_out(model: onnx_ir.Model) -> None:
    """Store what was transposed in the order in which it is read."""
    import onnx_ir

    for name, value in model.graph.initializers.items():
        if value.const_value is not None and not (array := value.const_value.numpy()).flags.c_contiguous:
            value.const_value = onnx_ir.tensor(np.ascontiguousarray(array), name=name)


def _drop_origins(model: onnx_ir.Model) -> None:
    """Without the names of files, classes and lines of the exporting program."""
    from onnx_ir.passes import common

    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
        value.doc_string = None


def _folds(node: onnx_ir.Node) -> bool | None:
    """Whether a node of constant inputs is computed when the file is written; None if that is left to the default."""
    import onnx_ir

    if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
        return False
    large = [value for value in node.inputs if value is not None and _size(value) > _SMALL]
    if node.op_type in _MOVES:
        # A weight that is also read as it is stays one initializer, and is moved when it is loaded.
        return all(_only_moves(use.node) for value in large for use in value.uses())
    if any(value.dtype in (onnx_ir.DataType.INT8, onnx_ir.DataType.UINT8, onnx_ir.DataType.INT4) for value in large):
        return False
    return None


def _only_moves(node: onnx_ir.Node) -> bool:
    return node.op_type in _MOVES and all(value is None or value.const_value is not None for value in node.inputs)


def _size(value: onnx_ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.size
