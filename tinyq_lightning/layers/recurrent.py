"""Recurrent layers with int8 weights: torch's own forward runs on float weights that are expanded from the codes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from operator import is_
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from typing_extensions import Self

from tinyq_lightning.errors import ReadOnlyWeightError
from tinyq_lightning.kernels import (
    Choice,
    choose_recurrent_kernel,
    count_modes,
    in_functorch,
    in_jit_trace,
    in_transform,
)
from tinyq_lightning.layers.computed import float_weight
from tinyq_lightning.layers.float_copies import FloatCopies, version_counter
from tinyq_lightning.layers.int8_weight import Int8Weight
from tinyq_lightning.layers.leaf import has_proxy, leaf_call
from tinyq_lightning.layers.named_codes import NamedCodes
from tinyq_lightning.methods import METHODS

__all__ = [
    "RECURRENT",
    "QuantizedGRU",
    "QuantizedGRUCell",
    "QuantizedLSTM",
    "QuantizedLSTMCell",
    "QuantizedRNN",
    "QuantizedRNNCell",
    "QuantizedRecurrent",
    "bias_names",
    "weight_shapes",
]

# Under names of this module, because a cell asks them at each step.
is_autocast_enabled, is_dynamo_compiling = torch.is_autocast_enabled, torch.compiler.is_dynamo_compiling

_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


_CELL_GATES: dict[type[nn.RNNCellBase], int] = {nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1}


# What torch's classes keep of their arguments, and the names of their weights.
_SETTINGS = {"mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"}
_SETTINGS |= {"proj_size", "nonlinearity", "_flat_weights_names", "_all_weights"}


class QuantizedRecurrent(NamedCodes):
    """What quantized recurrent layers have in common; each is a subclass of torch's class as well.

    A recurrent layer has several weights, each held as ``weight_ih_l0.int8_weights`` ``[rows, columns]`` int8 and
    ``weight_ih_l0.scales`` ``[rows]`` float32 in the state dict, or with four bits as
    :class:`~tinyq_lightning.layers.named_codes.NamedCodes` has it. Activations are used as they come. Outputs are bit
    for bit those of the float layer with the dequantized weights, in training mode too, because they are computed by
    torch's own forward. The biases are parameters, and gradients reach them, the input and the hidden state.

    ``weight_ih_l0`` and the others, ``all_weights`` and ``_flat_weights`` can be read: they are dequantized, and
    read-only.

    Args:
        like: a float layer of the same class, whose sizes and settings are taken; on the meta device too.
        method: ``w8a32`` or ``w4a32``.

    Attributes:
        torch_class: the class whose forward runs: torch's, or one that is derived from it.
        forward_is_own: whether that is a forward of the derived class.
        kernel: ``auto`` keeps a float copy of the weights in memory once the layer has run; ``compact``, ``int8`` and
            ``reference`` expand them on each call. With ``compact``, codes of four bits are held two a byte.
    """

    torch_class: ClassVar[Any]
    forward_is_own: ClassVar[bool] = False
    _choice: Choice | None

    def __init__(self, like: nn.Module, method: str = "w8a32") -> None:
        shapes = weight_shapes(like)
        first = float_weight(like, next(iter(shapes)))
        super().__init__(shapes, first.dtype, first.device, METHODS[method].bits)
        self.method = method
        vars(self).update({name: value for name, value in vars(like).items() if name in _SETTINGS})
        self.kernel = "auto"
        for name in bias_names(like):
            bias = like._parameters[name]
            zeros = None if bias is None else nn.Parameter(torch.zeros_like(bias), requires_grad=False)
            self.register_parameter(name, zeros)
        self._keep_a_parameter()

    @classmethod
    def from_float(
        cls, layer: nn.Module, shares: Mapping[str, Int8Weight] | None = None, method: str = "w8a32"
    ) -> Self:
        """A quantized layer with the weights of ``layer``. Biases are carried over as they are, not copied.

        Args:
            layer: the float layer.
            shares: codes and scales of each of its weights by name, to be taken; None to make them.
            method: ``w8a32`` or ``w4a32``.

        Raises:
            ModelError: a weight is not finite, or on the meta device.
        """
        made = cls(layer, method)
        if shares is None:
            made.quantize({name: float_weight(layer, name) for name in made.weight_names})
        else:
            made.take_codes({name: codes.tensors() for name, codes in shares.items()})
        for name in bias_names(layer):
            made._parameters[name] = layer._parameters[name]
        return made.train(layer.training)

    @property
    def choice(self) -> Choice:
        """Whether the layer keeps a float copy, and why."""
        if self._choice is None:
            self._choice = choose_recurrent_kernel(self.kernel, self.bits)
        return self._choice

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the forward of the float layer's class: of torch's classes for an input and a hidden state."""
        if (not args or type(args[0]) is not Tensor) and has_proxy(*args, *kwargs.values()):
            return leaf_call(self, *args, **kwargs)
        # Asked here, not in a function: torch.compile, which leaves this one out, would make a graph of that one alone.
        if is_dynamo_compiling():
            return self.torch_class.forward(self, *args, **kwargs)
        # A cell asks this at each step of a sequence, when its weights have taken the place of all else in the caches:
        # few Python objects are read, by functions of C.
        copies = self._copies
        if copies is not None and (ready := copies.ready) is not None:
            forward, buffers, parameters, counted, versions = ready
            if (
                not (in_jit_trace() or in_functorch() or count_modes() or forward_ad._current_level >= 0)
                and not is_autocast_enabled("cpu")
                and all(map(is_, buffers, self._buffers.values()))
                and all(map(is_, parameters, self._parameters.values()))
                and [*map(version_counter, counted)] == versions
            ):
                return forward(*args, **kwargs)
        layer = self._stand_in()
        if self.device.type != "cuda":
            return self.torch_class.forward(layer, *args, **kwargs)
        with warnings.catch_warnings():  # cuDNN tells that it joins weights that lie apart, which these do
            warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
            return self.torch_class.forward(layer, *args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _stand_in(self) -> nn.Module:
        """What takes the layer's place in torch's forward: an object of torch's class that has plain float weights.

        The layer itself, inside a transform or a tracer, which is to see that weights are computed from the codes.
        """
        if in_transform() or count_modes():
            return self
        copies = self.expanded()
        layer, parameters = copies.layer, self._parameters
        if layer is None or any(parameters[name] is not bias for name, bias in layer.__dict__["_biases"]):
            layer = copies.layer = self._new_stand_in(copies)
            if copies.dtype is self.dtype and self.device.type == "cpu":
                copies.ready = copies.ready_for(partial(self.torch_class.forward, layer), self)
        return layer

    def _new_stand_in(self, copies: FloatCopies) -> nn.Module:
        layer: nn.Module = object.__new__(self.torch_class)
        held = {name: value for name, value in vars(self).items() if name not in ("_copies", "_dequantized")}
        vars(layer).update(held, **self._float_weights(copies.weights), _biases=[*self._parameters.items()])
        return layer

    def keeps_copies(self) -> bool:
        """Whether the float weights that the layer has run on are held for its next call."""
        return self.choice.kernel == "float32"

    def holds_packed(self) -> bool:
        """Whether codes of four bits are held two a byte."""
        return self.bits == 4 and self.choice.kernel == "int4"

    def _float_weights(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        """The attributes in which torch's forward looks for weights."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Refused: the weights are codes.

        Raises:
            ReadOnlyWeightError: always.
        """
        raise ReadOnlyWeightError(f"{type(self).__name__} holds int8 codes: initialize the layer before quantizing it")

    def extra_repr(self) -> str:
        """What ``print(model)`` shows in the brackets."""
        kernel = "" if self.kernel == "auto" else f", kernel={self.kernel}"
        return f"{super().extra_repr()}, dtype={self.dtype}{kernel}"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_choice": None}  # of this machine and its environment

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "kernel":
            self._copies = self._choice = None
            self._hold()
        self._renew_stand_in()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self._renew_stand_in()

    def _renew_stand_in(self) -> None:
        """Let the next call make another, since this one has the former attributes."""
        if (copies := self.__dict__.get("_copies")) is not None:
            copies.layer = copies.ready = None


class _Sequences(QuantizedRecurrent):
    """Layers over whole sequences, whose forward takes their weights as one flat list."""

    _flat_weights_names: list[str]

    def _float_weights(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        parameters = self._parameters
        flat = [weights[name] if name in weights else parameters[name] for name in self._flat_weights_names]
        # without names and references there is nothing that torch would find changed
        return {**weights, "_flat_weights": flat, "_flat_weights_names": [], "_flat_weight_refs": []}

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._flat_weights_names]

    def flatten_parameters(self) -> None:
        """Nothing to do: the float weights are made anew when they are needed."""

    def _init_flat_weights(self) -> None:
        """Nothing to do: they are a property."""

    def _update_flat_weights(self) -> None:
        """Nothing to do: they are a property."""


class QuantizedRNN(_Sequences, nn.RNN):  # type: ignore[misc]
    """``nn.RNN`` with int8 weights and activations as they are."""

    torch_class = nn.RNN


class QuantizedLSTM(_Sequences, nn.LSTM):  # type: ignore[misc]
    """``nn.LSTM`` with int8 weights and activations as they are."""

    torch_class = nn.LSTM


class QuantizedGRU(_Sequences, nn.GRU):  # type: ignore[misc]
    """``nn.GRU`` with int8 weights and activations as they are."""

    torch_class = nn.GRU


class _Cell(QuantizedRecurrent):
    """Layers over one step, whose forward reads their weights by name."""

    def _float_weights(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        # biases as plain attributes too: torch reads them at each step, and nn.Module is slow to find parameters
        return {**weights, **{name: self._parameters[name] for name in bias_names(self)}}


class QuantizedRNNCell(_Cell, nn.RNNCell):
    """``nn.RNNCell`` with int8 weights and activations as they are."""

    torch_class = nn.RNNCell


class QuantizedLSTMCell(_Cell, nn.LSTMCell):
    """``nn.LSTMCell`` with int8 weights and activations as they are."""

    torch_class = nn.LSTMCell


class QuantizedGRUCell(_Cell, nn.GRUCell):
    """``nn.GRUCell`` with int8 weights and activations as they are."""

    torch_class = nn.GRUCell


RECURRENT: dict[type[nn.Module], type[QuantizedRecurrent]] = {
    layer.torch_class: layer
    for layer in (QuantizedRNN, QuantizedLSTM, QuantizedGRU, QuantizedRNNCell, QuantizedLSTMCell, QuantizedGRUCell)
}
"""The quantized layer of each class of torch's."""


def weight_shapes(layer: nn.Module) -> dict[str, tuple[int, int]]:
    """Rows and columns of each weight of a recurrent layer, float or quantized, by its name and the sizes it tells."""
    if isinstance(layer, nn.RNNCellBase):
        gates = next(count for base, count in _CELL_GATES.items() if isinstance(layer, base))
        rows = gates * layer.hidden_size
        return {"weight_ih": (rows, layer.input_size), "weight_hh": (rows, layer.hidden_size)}
    layer = cast(nn.RNNBase, layer)
    rows, out = _GATES[layer.mode] * layer.hidden_size, layer.proj_size or layer.hidden_size
    shapes = {}
    for index in range(layer.num_layers):
        columns = layer.input_size if index == 0 else out * (2 if layer.bidirectional else 1)
        for suffix in _suffixes(layer, index):
            shapes[f"weight_ih{suffix}"] = rows, columns
            shapes[f"weight_hh{suffix}"] = rows, out
            if layer.proj_size:
                shapes[f"weight_hr{suffix}"] = layer.proj_size, layer.hidden_size
    return shapes


def bias_names(layer: nn.Module) -> tuple[str, ...]:
    """The names under which a recurrent layer holds its biases; those of a cell may be None."""
    if isinstance(layer, nn.RNNCellBase):
        return "bias_ih", "bias_hh"
    layer = cast(nn.RNNBase, layer)
    indices = range(layer.num_layers) if layer.bias else ()
    return tuple(f"bias_{part}{end}" for index in indices for end in _suffixes(layer, index) for part in ("ih", "hh"))


def _suffixes(layer: nn.RNNBase, index: int) -> tuple[str, ...]:
    return (f"_l{index}", f"_l{index}_reverse")[: 2 if layer.bidirectional else 1]
