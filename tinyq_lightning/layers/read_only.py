"""Tensors that can be read in every way and whose in-place methods are errors, since what they wrote would be lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from tinyq_lightning.errors import ReadOnlyWeightError

__all__ = [
    "ReadOnlyTensor",
    "read_only",
]


class ReadOnlyTensor(Tensor):
    """A tensor that refuses its in-place methods, ``data`` and ``detach()`` included.

    What is computed from it, views among that, are plain tensors, and so are its clones, copies and
    pickles. Functions of ``torch`` see no difference.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as nn.Parameter has it

    @property
    def data(self) -> ReadOnlyTensor:
        """The same values, as little to be written to."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        _refuse("data = ...")

    def detach(self) -> ReadOnlyTensor:
        """The same values, as little to be written to."""
        return super().detach().as_subclass(ReadOnlyTensor)

    def requires_grad_(self, requires_grad: bool = True) -> ReadOnlyTensor:
        """Refused where a gradient is asked for."""
        return _refuse("requires_grad_") if requires_grad else self

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def read_only(tensor: Tensor) -> Tensor:
    """``tensor``, over the same memory, as a read-only one.

    As it is where it is of a kind of its own, or a compiler traces: it would have the kind in its graph.
    """
    if torch.compiler.is_compiling() or type(tensor) is not Tensor:
        return tensor
    return tensor.as_subclass(ReadOnlyTensor)


def _refuse(what: str) -> NoReturn:
    raise ReadOnlyWeightError(
        f"{what} would be lost: .weight of a quantized layer is made anew from its int8 codes on each read. Call "
        ".quantize(weight) on the layer to replace its weight, or take a .clone() of it"
    )


def _refusing(name: str) -> Callable[..., NoReturn]:
    def method(self: ReadOnlyTensor, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(name)

    return method


_names = set(dir(Tensor))


_in_place = {name for name in _names if name.endswith("_") and not name.startswith("_")}


_in_place |= {name for name in _names if name.startswith("__i") and f"__{name[3:]}" in _names}  # __iadd__ of __add__


for _name in _in_place - {"requires_grad_", "share_memory_"} | {"__setitem__"}:
    setattr(ReadOnlyTensor, _name, _refusing(_name))
