"""What the writer of a format is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tinyq_lightning.handover.dynamic import DynamicDims
from tinyq_lightning.handover.example import Example
from tinyq_lightning.methods import Activations

__all__ = [
    "Request",
]


@dataclass(frozen=True)
class Request:
    """A quantized model and the call to write.

    Attributes:
        module: what is called, as ``module(*example.args, **example.kwargs)``: the model, or one of its methods behind
            a ``forward``. In eval mode, on the CPU; gradients are off while it is written and run.
        example: inputs to trace it with. Each dynamic dimension has a size of at least 2, as tracers need.
        dims: the dimensions of the inputs that may have other sizes; without any, all sizes are those of the example.
        output_names: of the output's tensors, in the order in which torch's pytree flattens them.
        activations: ``dynamic``: rounded by ranges taken as they come; ``static``: to uint8 by ranges from
            ``calibration``; ``static-signed``: to int8 with zero point 0 by such ranges.
        calibration: inputs, each like the example, to take the ranges from; None unless activations are static.
        threads: for the runtime that runs what was written, so that times can be compared with the model's.
        settings: of that runtime, by name; its own defaults for all others.
    """

    module: nn.Module
    example: Example
    dims: DynamicDims
    output_names: tuple[str, ...]
    activations: Activations = "dynamic"
    calibration: Iterable[Any] | None = None
    threads: int = 1
    settings: Mapping[str, str] = field(default_factory=dict)
