"""Recurrent layers as a kind: which of torch's classes they are of, and why one of them stays float."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import override

from tinyq_lightning.kernels import Choice, choose_recurrent_kernel
from tinyq_lightning.layers.int8_weight import Int8Weight
from tinyq_lightning.layers.kind import Candidate, Kind, WeightSize, first_tensor
from tinyq_lightning.layers.quantized_layer import QuantizedLayer
from tinyq_lightning.layers.recurrent import RECURRENT, QuantizedRecurrent, bias_names, weight_shapes
from tinyq_lightning.layers.recurrent_inputs import inner_calls, step_inputs
from tinyq_lightning.layers.recurrent_subclass import quantized_class, torch_class, why_own_code
from tinyq_lightning.layers.why_float import why_holds_more, why_weight
from tinyq_lightning.methods import METHODS, KernelName

__all__ = [
    "RecurrentKind",
]


class RecurrentKind(Kind):
    """``nn.RNN``, ``nn.LSTM``, ``nn.GRU``, their cells, and subclasses whose code can run on float weights."""

    name = "recurrent"
    methods = ("w8a32", "w4a32")
    why_w8a32 = "recurrent layers take activations as they are"
    why_uncalibrated = None
    quantized_class = QuantizedRecurrent
    left_behind = frozenset({"_flat_weights", "_flat_weight_refs"})

    @override
    def finds(self, module: nn.Module) -> bool:
        return isinstance(module, tuple(RECURRENT)) and not isinstance(module, QuantizedLayer)

    @override
    def candidates(self, module: nn.Module, closed: str | None) -> Iterator[Candidate]:
        names, biases = weight_shapes(module), bias_names(module)
        reasons = (why_weight(module, name, hooks=False) for name in names)
        why = closed or why_own_code(module, torch_class(module)) or next(filter(None, reasons), None)
        why = why or _why_bias(module, biases) or why_holds_more(module, {*names, *biases}) or _why_mixed(module, names)
        yield Candidate(self, module, {name: (module, name) for name in names}, why)

    @override
    def sizes(self, layer: Any) -> Mapping[str, WeightSize]:
        return {name: WeightSize(shape, shape[0]) for name, shape in weight_shapes(layer).items()}

    @override
    def choice(self, layer: Any, method: str, kernel: KernelName) -> Choice | None:
        return choose_recurrent_kernel(kernel, METHODS[method].bits)

    @override
    def make(self, layer: Any, codes: Mapping[str, Int8Weight], method: str, kernel: KernelName) -> QuantizedRecurrent:
        made = quantized_class(layer).from_float(layer, codes, method)
        made.kernel = kernel
        return made

    @override
    def make_empty(self, layer: Any, method: str, kernel: KernelName) -> QuantizedRecurrent:
        made = quantized_class(layer)(layer, method)
        made.kernel = kernel
        return made

    @override
    def size_of_call(self, layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
        x = first_tensor(args, kwargs)
        given = args[0] if args else next(iter(kwargs.values()))
        if not isinstance(given, PackedSequence):
            return x.numel(), tuple(x.shape)
        steps, batch = len(given.batch_sizes), int(given.batch_sizes[0])
        return x.numel(), (batch, steps, x.shape[1]) if layer.batch_first else (steps, batch, x.shape[1])

    @override
    def weight_inputs(
        self, layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Iterator[tuple[str, Tensor]]:
        if first_tensor(args, kwargs).numel():
            for inner in inner_calls(layer, torch_class(layer), args, kwargs):
                for name, inputs in step_inputs(layer, *inner):
                    yield name, inputs[None]

    @override
    def plain(self, layer: nn.Module) -> nn.Module:
        if not parametrize.is_parametrized(layer):
            return layer
        layer = copy.deepcopy(layer).eval()
        for name in list(cast(nn.ModuleDict, layer.parametrizations)):
            parametrize.remove_parametrizations(layer, name)
        return layer


def _why_bias(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """Why a bias cannot be carried over; None if all can."""
    for name in names:
        bias = module._parameters.get(name, module)  # a cell has None for a bias that it lacks
        if bias is not None and type(bias) is not nn.Parameter:
            return f"its {name} is no plain parameter"
    return None


def _why_mixed(module: nn.Module, names: Mapping[str, Any]) -> str | None:
    """Why weights that differ in dtype or device cannot be held by one layer; None if they do not."""
    weights = [cast(Tensor, getattr(module, name)) for name in names]
    dtypes = {str(each.dtype).removeprefix("torch.") for each in weights}
    devices = {str(each.device) for each in weights}
    mixed = dtypes if len(dtypes) > 1 else devices if len(devices) > 1 else ()
    return f"its weights are of {' and '.join(sorted(mixed))}" if mixed else None
