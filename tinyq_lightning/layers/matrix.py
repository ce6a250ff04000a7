"""Matrices that a module reads without a layer of torch's around them, such as fused experts: held as int8 codes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from tinyq_lightning.errors import ModelError, ReadOnlyWeightError
from tinyq_lightning.kernels import wanted_kernel
from tinyq_lightning.layers.int8_weight import Int8Weight
from tinyq_lightning.layers.kind import Candidate, Kind, WeightSize
from tinyq_lightning.layers.state_entries import is_path_walked
from tinyq_lightning.layers.why_float import why_weight
from tinyq_lightning.methods import METHODS, KernelName

__all__ = [
    "Int8Matrix",
    "MatrixKind",
    "MatrixPlace",
    "bare_matrix",
]


# A scale of four bytes for fewer values than these would take a quarter of what the codes save, or more.
_SHORTEST_ROW = 16


def row_count(shape: Sequence[int]) -> int:
    """The number of scales of a parameter: one for each row of its last dimension.

    Where that is short, as in banks of kernels ``[bank, out, in, 3, 3]``, a row is of several last dimensions; but a
    parameter has more rows than one.
    """
    dims = len(shape) - 1
    while math.prod(shape[dims:]) < _SHORTEST_ROW and math.prod(shape[: dims - 1]) > 1:
        dims -= 1
    return math.prod(shape[:dims])


class Int8Matrix(Int8Weight):
    """A parameter of two dimensions or more as codes, with as many scales as :func:`row_count` says.

    It is a child of the module that had the parameter, which reads its values under the parameter's name; so do
    state dicts, as ``<parameter>.int8_weights`` and ``<parameter>.scales``. See :class:`MatrixPlace`.

    Args:
        parameter: the name of the parameter.
        size: of the parameter.
        dtype: of what is read.
        device: where it lives.
        method: ``w8a32`` or ``w4a32``.
    """

    _transposed_groups = -1

    def __init__(
        self,
        parameter: str,
        size: WeightSize,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        method: str = "w8a32",
    ) -> None:
        super().__init__(size.rows, size.columns, dtype, device)
        self.int8_weights = self.int8_weights.view(size.shape)
        self.shape, self.parameter, self.method = size.shape, parameter, method
        if METHODS[method].bits == 4:
            self._hold_four_bits()

    @override
    def quantize(self, weight: Tensor) -> Self:
        if weight.shape != self.shape:
            raise ModelError(f"{self.parameter} has the shape {list(self.shape)}, got {list(weight.shape)}")
        return super().quantize(weight)

    @override
    def _prepare_reading(self) -> None:
        # With `kernel: compact`, codes of four bits are expanded whenever values are read.
        if self.bits == 4 and wanted_kernel(self.kernel) in ("compact", "int4"):
            self.form("int4")

    @override
    def _to_rows(self, weight: Tensor) -> Tensor:
        return weight.reshape(len(self.scales), -1)

    @override
    def _from_rows(self, codes: Tensor) -> Tensor:
        return codes.view(self.shape)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        stem = prefix.removesuffix(f"{child_name(self.parameter)}.")
        super()._save_to_state_dict(destination, prefix if stem == prefix else f"{stem}{self.parameter}.", keep_vars)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        scales = state_dict.get(f"{prefix}scales")
        if isinstance(scales, Tensor) and len(self.scales) != scales.numel() == math.prod(self.shape[:-1]):
            self._take_short_rows()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _take_short_rows(self) -> None:
        """Have a scale for each row of the last dimension, as files have it that were written by 0.1."""
        self.unpack()
        self.scales = self.scales.new_ones(math.prod(self.shape[:-1]))
        if self.bits == 4:
            self._hold_four_bits()

    def extra_repr(self) -> str:
        """What ``print(model)`` shows in the brackets."""
        return f"{list(self.shape)}, dtype={self.dtype}"


class BareMatrix(nn.Module):
    """Stands for a parameter that no layer has, as its ``weight``."""

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        super().__init__()
        self.name, self.weight = name, parameter


def child_name(parameter: str) -> str:
    """What the child is called that holds the codes of a parameter: torch finds modules by reading attributes."""
    return f"{parameter}_codes"


def bare_matrix(module: nn.Module, name: str) -> Candidate:
    """The parameter ``name`` of ``module`` as a layer of its own."""
    parameter = module._parameters[name]
    assert parameter is not None
    why = why_weight(module, name)
    taken = [each for each, there in ((name, type(module)), (child_name(name), module)) if hasattr(there, each)]
    if why is None and taken:
        why = f"{type(module).__name__} has an attribute {taken[0]} of its own"
    if isinstance(module, torch.jit.ScriptModule):
        why = "it is in a module of TorchScript"
    return Candidate(MatrixKind(), BareMatrix(name, parameter).train(module.training), {"weight": (module, name)}, why)


class MatrixKind(Kind):
    """Parameters of two dimensions or more that no layer has: only those that a rule names."""

    name = "matrix"
    methods = ("w8a32", "w4a32")
    why_w8a32 = "a matrix that is read has no activations"
    is_called = False
    why_uncalibrated = "what it is multiplied with is not seen"
    quantized_class = Int8Matrix

    @override
    def finds(self, module: nn.Module) -> bool:
        return False  # a rule finds them

    @override
    def candidates(self, module: nn.Module, closed: str | None) -> Iterator[Candidate]:
        return iter(())

    @override
    def sizes(self, layer: Any) -> Mapping[str, WeightSize]:
        if isinstance(layer, Int8Matrix):
            return {"weight": WeightSize(layer.shape, len(layer.scales))}
        shape = tuple(layer.weight.shape)
        return {"weight": WeightSize(shape, row_count(shape))}

    @override
    def size_with(self, size: WeightSize, rows: int) -> WeightSize:
        return WeightSize(size.shape, rows) if rows == math.prod(size.shape[:-1]) else size

    @override
    def make(self, layer: Any, codes: Mapping[str, Int8Weight], method: str, kernel: KernelName) -> Int8Matrix:
        made = Int8Matrix(layer.name, self.sizes(layer)["weight"], layer.weight.dtype, "meta", method)
        made.kernel = kernel
        return made.share(codes["weight"])

    @override
    def make_empty(self, layer: Any, method: str, kernel: KernelName) -> Int8Matrix:
        weight = layer.weight
        made = Int8Matrix(layer.name, self.sizes(layer)["weight"], weight.dtype, weight.device, method)
        made.kernel = kernel
        return made


@dataclass(frozen=True)
class MatrixPlace:
    """The attribute by which a module reads one of its parameters.

    Attributes:
        module: the module.
        name: of the parameter.
        parameter: the float one.
        order: the names of all parameters of the module, in the order in which it has them.
    """

    module: nn.Module
    name: str
    parameter: nn.Parameter
    order: Sequence[str] = field(repr=False)

    def put(self, layer: nn.Module) -> None:
        """Have the module read the dequantized values of an :class:`Int8Matrix`; of anything else, its parameter."""
        if isinstance(layer, Int8Matrix):
            self.module._parameters.pop(self.name, None)
            self.module._modules[child_name(self.name)] = layer
        else:
            self.module._modules.pop(child_name(self.name), None)
            held = {**self.module._parameters, self.name: self.parameter}
            self.module._parameters.clear()
            known = [name for name in self.order if name in held]
            self.module._parameters.update({name: held[name] for name in (*known, *(held.keys() - set(known)))})
        read = tuple(child.parameter for child in self.module._modules.values() if isinstance(child, Int8Matrix))
        base: Any = getattr(type(self.module), "_reads_codes_of", type(self.module))
        self.module.__class__ = _reading(base, read) if read else base


@cache
def _reading(base: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass whose attributes ``names`` give the values of the children that hold their codes."""

    def refuse(self: nn.Module, name: str, value: Any) -> None:
        if name in names and child_name(name) in vars(self).get("_modules", {}):
            raise ReadOnlyWeightError(
                f"{name} of {base.__name__} is a read-only view of int8 codes: assign before quantizing, or call "
                f".{child_name(name)}.quantize(values)"
            )
        base.__setattr__(self, name, value)

    def load(self: nn.Module, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in names:
            for key in [key for key in state_dict if key.startswith(f"{prefix}{name}.")]:
                renamed = f"{prefix}{child_name(name)}.{key.removeprefix(f'{prefix}{name}.')}"
                state_dict[renamed] = state_dict.pop(key)
        base._load_from_state_dict(self, state_dict, prefix, *args)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        state_of = getattr(self, "__getstate__", None)  # which Python 3.10 has only where a class defines it
        return _rebuilt, (base, names), vars(self) if state_of is None else state_of()

    content: dict[str, Any] = {name: _reads(base, name) for name in names}
    content |= {"__setattr__": refuse, "__reduce_ex__": reduce, "_load_from_state_dict": load, "_reads_codes_of": base}
    content |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), content)


def _reads(base: type[nn.Module], name: str) -> property:
    """The attribute ``name`` of modules that derive from ``base``. A plain function: torch 2.7 compiles no other."""

    def read(module: nn.Module) -> Tensor | Int8Matrix:
        child = module._modules.get(child_name(name))
        if isinstance(child, Int8Matrix):
            return child if is_path_walked() else child.weight
        return base.__getattr__(module, name)  # type: ignore[return-value]

    return property(read)


def _rebuilt(base: Any, names: tuple[str, ...]) -> nn.Module:
    """For copies and pickles, which fill it."""
    module: nn.Module = object.__new__(_reading(base, names))
    return module
