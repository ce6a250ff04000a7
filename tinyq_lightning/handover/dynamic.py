"""Which dimensions of the inputs may have other sizes in what is exported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tinyq_lightning.errors import ModelError
from tinyq_lightning.handover.example import Example, resized

__all__ = [
    "BATCH",
    "Dynamic",
    "DynamicDims",
    "dynamic_dims",
]

Dynamic = bool | Mapping[Any, Any]
"""``True``: the batch; ``False``: nothing; or named dimensions, see :func:`dynamic_dims`."""

BATCH = "batch"


@dataclass(frozen=True)
class DynamicDims:
    """The dynamic dimensions of the inputs.

    Attributes:
        places: the name of each dynamic dimension by its place, by the name of the input tensor.
        bounds: the smallest and the largest size of a name, if the user has given them.
    """

    places: Mapping[str, Mapping[int, str]]
    bounds: Mapping[str, tuple[int, int | None]]

    @property
    def names(self) -> list[str]:
        """The names, in the order of the inputs."""
        return list(dict.fromkeys(name for places in self.places.values() for name in places.values()))

    def for_torch(self, example: Example) -> dict[str, Any] | None:
        """The ``dynamic_shapes`` of ``torch.export``; None if nothing is dynamic."""
        if not self.places:
            return None
        by_name = {name: self._dim(name) for name in self.names}
        names = {id(tensor): name for name, tensor in example.tensors().items()}

        def shapes(leaf: Any) -> dict[int, Any] | None:
            places = self.places.get(names[id(leaf)], {}) if isinstance(leaf, Tensor) else {}
            return {place: by_name[name] for place, name in places.items()} or None

        found: dict[str, Any] = pytree.tree_map(shapes, example.parameters)
        return found

    def _dim(self, name: str) -> Any:
        """A hint lets torch find the range of sizes for which the model is the same; bounds of the user are held."""
        if name not in self.bounds:
            return torch.export.Dim.DYNAMIC
        least, most = self.bounds[name]
        return torch.export.Dim(name, min=least, max=most)

    def sizes_of(self, example: Example) -> dict[str, int]:
        """The size of each name in an example."""
        found: dict[str, int] = {}
        for tensor_name, tensor in example.tensors().items():
            for place, name in self.places.get(tensor_name, {}).items():
                found.setdefault(name, tensor.shape[place])
        return found

    def resized(self, example: Example, sizes: Mapping[str, int], seed: int = 0) -> Example:
        """Random inputs like the example's with other sizes of some names."""
        changes: dict[str, dict[int, int]] = {}
        for tensor_name, places in self.places.items():
            for place, name in places.items():
                if name in sizes:
                    changes.setdefault(tensor_name, {})[place] = sizes[name]
        return resized(example, changes, seed)

    def large_enough(self, example: Example) -> Example:
        """The example with at least 2 in each dynamic dimension: tracers take a size of 1 for a constant."""
        small = {name: 2 for name, size in self.sizes_of(example).items() if size < 2}
        return self.resized(example, small) if small else example

    def other_sizes(self, example: Example) -> list[dict[str, int]]:
        """Sizes that the example does not have: one row, and three rows more; shorter in other dimensions.

        Rows are the dimension ``batch``, or without one of that name the first ones. What cannot be shorter is longer.
        """
        now = self.sizes_of(example)
        if not now:
            return []
        rows = {BATCH} if BATCH in now else {places[0] for places in self.places.values() if 0 in places}
        shorter = {name: 2 * size // 3 or size + 3 for name, size in now.items() if name not in rows}
        cases = [shorter | dict.fromkeys(rows, 1), shorter | {name: now[name] + 3 for name in rows}]
        bounded = [{name: self._within(name, size) for name, size in case.items()} for case in cases]
        return bounded if rows else bounded[:1]

    def _within(self, name: str, size: int) -> int:
        least, most = self.bounds.get(name, (1, None))
        return max(least, size if most is None else min(size, most))


def dynamic_dims(example: Example, dynamic: Dynamic) -> DynamicDims:
    """What the user has asked for, for the tensors of an example.

    Args:
        example: the example inputs.
        dynamic: ``True``: the first dimension of each tensor, where it has the size that the first tensor has there,
            is ``batch``. ``False``: all sizes are fixed. A mapping from a place to a name, ``{0: "batch", 1:
            "tokens"}``, says so of every tensor that has the place. A mapping by the name of a tensor, ``{"ids": {0:
            "batch", 1: "tokens"}}``, says it one by one. A ``torch.export.Dim`` in the place of a name gives bounds.

    Raises:
        ModelError: a name or a place is not there, or a name has two sizes in the example.
    """
    tensors = example.tensors()
    if dynamic is False:
        return DynamicDims({}, {})
    if dynamic is True:
        first = next((tensor for tensor in tensors.values() if tensor.dim()), None)
        rows = None if first is None else first.shape[0]
        places = {name: {0: BATCH} for name, tensor in tensors.items() if tensor.dim() and tensor.shape[0] == rows}
        dims = DynamicDims(places, {})
        _refuse_empty(dims, tensors)
        return dims
    if not isinstance(dynamic, Mapping):
        raise ModelError(f"dynamic must be True, False or a mapping of dimensions to names, not {dynamic!r}")
    by_tensor = _by_tensor(tensors, dynamic)
    bounds = _bounds(by_tensor)
    dims = DynamicDims(
        {name: {place: _name_of(dim) for place, dim in dims.items()} for name, dims in by_tensor.items() if dims},
        bounds,
    )
    _check_sizes(dims, tensors)
    _refuse_empty(dims, tensors)
    return dims


def _refuse_empty(dims: DynamicDims, tensors: Mapping[str, Tensor]) -> None:
    for tensor_name, places in dims.places.items():
        shape = list(tensors[tensor_name].shape)
        if any(shape[place] == 0 for place in places):
            raise ModelError(
                f"the example input {tensor_name} has the shape {shape}, and nothing can be computed of no rows: give "
                "an example that has some"
            )


def _by_tensor(tensors: Mapping[str, Tensor], dynamic: Mapping[Any, Any]) -> dict[str, dict[int, Any]]:
    if all(isinstance(key, int) for key in dynamic):
        return {
            name: {place: dim for place, dim in dynamic.items() if place < tensor.dim()}
            for name, tensor in tensors.items()
        }
    found = {}
    for name, dims in dynamic.items():
        if name not in tensors:
            raise ModelError(f"dynamic names {name!r}, and the inputs are {', '.join(tensors)}")
        if not isinstance(dims, Mapping) or not all(isinstance(place, int) for place in dims):
            raise ModelError(f"dynamic[{name!r}] must map dimensions to names, as in {{0: 'batch'}}, not {dims!r}")
        for place in dims:
            if not 0 <= place < tensors[name].dim():
                raise ModelError(f"dynamic[{name!r}] names dimension {place} of {list(tensors[name].shape)}")
        found[name] = dict(dims)
    return found


def _name_of(dim: Any) -> str:
    return dim if isinstance(dim, str) else str(dim.__name__)


def _bounds(by_tensor: Mapping[str, Mapping[int, Any]]) -> dict[str, tuple[int, int | None]]:
    bounds: dict[str, tuple[int, int | None]] = {}
    for tensor_name, dims in by_tensor.items():
        for place, dim in dims.items():
            if isinstance(dim, str):
                continue
            if not hasattr(dim, "min") or not hasattr(dim, "max"):
                raise ModelError(f"dynamic[{tensor_name!r}][{place}] must be a name or a torch.export.Dim, not {dim!r}")
            most = dim.max if isinstance(dim.max, int) and dim.max < 2**31 else None
            bounds[_name_of(dim)] = (int(dim.min), most)
    return bounds


def _check_sizes(dims: DynamicDims, tensors: Mapping[str, Tensor]) -> None:
    sizes: dict[str, tuple[str, int]] = {}
    for tensor_name, places in dims.places.items():
        for place, name in places.items():
            size = tensors[tensor_name].shape[place]
            where, before = sizes.setdefault(name, (tensor_name, size))
            if before != size:
                raise ModelError(
                    f"the dimension {name!r} has {before} places in the example's {where} and {size} in its "
                    f"{tensor_name}: give dimensions of different sizes different names"
                )
