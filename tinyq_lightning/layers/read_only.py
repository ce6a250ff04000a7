"""Weights that are dequantized when their values are read, and whose in-place methods are errors.

An in-place method would write to a copy that nobody reads again, so it is refused instead of lost. So it is of views.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tinyq_lightning.errors import ReadOnlyWeightError

__all__ = [
    "ReadOnlyTensor",
]


class ReadOnlyTensor(Tensor):
    """A tensor that knows its shape, dtype and device, and gets its values when something reads them.

    It refuses in-place methods, and so do ``data``, ``detach()`` and views of it, and views of those. What is computed
    from it is a plain tensor, and so are its clones, copies and pickles. Functions of ``torch`` see no difference.

    Args:
        make: returns the values, a plain tensor; called at most once, with this tensor.
        shape: of the values.
        dtype: of the values.
        device: of the values.
        layout: of the values in memory.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as nn.Parameter has it

    _make: Callable[[ReadOnlyTensor], Tensor] | None
    _made: Tensor | None

    @staticmethod
    def __new__(  # noqa: D102
        cls,
        make: Callable[[ReadOnlyTensor], Tensor],
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> ReadOnlyTensor:
        strides = None if layout is torch.contiguous_format else _strides(shape, layout)
        tensor: ReadOnlyTensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, device=device
        )
        tensor._make, tensor._made = make, None
        return tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @property
    def requires_grad(self) -> bool:
        """False: a gradient would reach a copy of the values that is made anew."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if value:
            _refuse("requires_grad = True")

    def values(self) -> Tensor:
        """The values as a plain tensor."""
        made = self._made
        if made is None:
            make = self._make
            if make is None:  # another thread has just made them
                return self.values()
            made = self._made = make(self)
            self._make = None  # which holds the codes
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            _refuse_writes(func, args, kwargs)
        is_view = func.is_view and isinstance(args[0], ReadOnlyTensor)
        got = func(*_plain(args), **(kwargs and {name: _plain(value) for name, value in kwargs.items()}))
        if not is_view:
            return got
        return _view(got) if isinstance(got, Tensor) else [_view(each) for each in got]

    @property
    def data(self) -> ReadOnlyTensor:
        """The same values, as read-only as this tensor."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        _refuse("data = ...")

    def detach(self) -> ReadOnlyTensor:
        """The same values, as read-only as this tensor."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> ReadOnlyTensor:
        """Refused if a gradient is asked for."""
        return _refuse("requires_grad_") if requires_grad else self

    def share_memory_(self) -> Tensor:
        """The values in shared memory."""
        shared: Tensor = self.values().clone().share_memory_()  # type: ignore[no-untyped-call]
        return shared

    # torch implements these outside of its dispatcher. What they return may be written to, so it is a copy.
    def numpy(self, *, force: bool = False) -> Any:
        """A copy of the values as a NumPy array."""
        return self.values().clone().numpy(force=force)

    def __array__(self, dtype: Any = None) -> Any:
        return self.values().clone().__array__(dtype)  # type: ignore[no-untyped-call]

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.values().clone().__dlpack__(**kwargs)

    def tolist(self) -> Any:
        """The values as nested lists."""
        return self.values().tolist()

    def data_ptr(self) -> int:
        """The address of the values, valid as long as this tensor lives."""
        return self.values().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """The memory of the values."""
        return self.values().untyped_storage()

    def __deepcopy__(self, memo: Any) -> Tensor:
        copied = memo[id(self)] = self.clone()
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _refuse_writes(func: Any, args: Any, kwargs: Any) -> None:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            if any(isinstance(each, ReadOnlyTensor) for each in tree_leaves(given)):
                _refuse(func._schema.name.removeprefix("aten::"))


def _plain(given: Any) -> Any:
    """An argument of an operator with the values of weights; torch's own functions for nested ones take longer."""
    if isinstance(given, ReadOnlyTensor):
        return given.values()
    return type(given)(map(_plain, given)) if isinstance(given, list | tuple) else given


def _view(values: Tensor) -> ReadOnlyTensor:
    """A view of a weight, which has its values."""
    strides, offset = values.stride(), values.storage_offset()
    with torch.inference_mode(False):  # as the weight is made, whose versions torch counts for its views
        view: ReadOnlyTensor = torch.Tensor._make_wrapper_subclass(
            ReadOnlyTensor,
            values.shape,
            strides=strides,
            storage_offset=offset,
            dtype=values.dtype,
            device=values.device,
        )
    view._make, view._made = None, values
    return view


def _strides(shape: torch.Size, layout: torch.memory_format) -> tuple[int, ...]:
    return torch.empty(shape, device="meta", memory_format=layout).stride()


def _refuse(what: str) -> NoReturn:
    raise ReadOnlyWeightError(
        f"{what} would be lost: .weight of a quantized layer is computed from its int8 codes when it is read. Call "
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
