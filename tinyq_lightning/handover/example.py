"""Example inputs: the arguments of one call, the names of their tensors, and other inputs like them."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from tinyq_lightning.errors import ModelError, quoted
from tinyq_lightning.file import import_named

__all__ = [
    "PLAIN",
    "Example",
    "as_arguments",
    "copies_on_cpu",
    "example_for",
    "flat_names",
    "import_example",
    "named_arguments",
    "parameters_of_call",
    "part_of",
    "refuse_without_forward",
    "resized",
]


PLAIN = (
    *(Tensor, bool, int, float, complex, str, bytes, type(None), enum.Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
"""What arguments and outputs of a graph are, or tuples, lists and dicts of."""


@dataclass(frozen=True)
class Example:
    """The arguments of one call.

    Attributes:
        args: the positional ones.
        kwargs: those by name.
        parameters: the same by the name of the parameter that takes them, in the order of the signature, as
            ``torch.export`` names them in ``dynamic_shapes``. Those that ``**kwargs`` takes have their own names.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parameters: dict[str, Any]

    def fresh(self) -> Example:
        """The same call with copies of all tensors, for a model that changes its inputs in place."""
        return self.with_tensors(lambda _, tensor: tensor.clone())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name: of the parameter, and the way into it (``x``, ``batch.image``, ``states.0``)."""
        leaves = flat_names(self.parameters)
        return {name: leaf for name, leaf in leaves if isinstance(leaf, Tensor)}

    def with_tensors(self, change: Callable[[str, Tensor], Tensor]) -> Example:
        """The same call with other tensors.

        Args:
            change: is given each tensor with its name, and returns what takes its place.
        """
        old = self.tensors()
        new = {id(tensor): change(name, tensor) for name, tensor in old.items()}

        def changed(leaf: Any) -> Any:
            return new.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf

        args, kwargs, parameters = (
            pytree.tree_map(changed, each) for each in (self.args, self.kwargs, self.parameters)
        )
        return Example(args, kwargs, parameters)


def flat_names(value: Any, root: str = "") -> list[tuple[str, Any]]:
    """The leaves of nested tuples, lists and mappings with names such as ``logits`` and ``states.0``."""
    found, _ = pytree.tree_flatten_with_path(value, is_leaf=_is_packed)
    names = []
    for path, leaf in found:
        parts = [part_of(each) for each in path]
        if root:
            parts = [f"{root}_{parts[0]}", *parts[1:]] if parts and parts[0].isdecimal() else parts or [root]
        names.append((".".join(parts), leaf))
    return names


def part_of(key: Any) -> str:
    """The name of a step of a path in torch's pytree: a key, a place or an attribute."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def import_example(path: str) -> Any:
    """What the function at ``package.module:function`` returns.

    Raises:
        ModelError: there is no such function, or it fails.
    """
    function = import_named(path)
    if not callable(function):
        raise ModelError(f"{path!r} is no function: give one that takes nothing and returns the example inputs")
    try:
        return function()
    except Exception as error:
        raise ModelError(f"{path!r} returned no example inputs: {quoted(error)}") from error


def copies_on_cpu(given: Any) -> Any:
    """The same structure with copies of its tensors on the CPU: a model or a step may change those it is given."""

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, PackedSequence):
            return leaf.cpu()
        return leaf.detach().cpu().clone() if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(copied, given, is_leaf=_is_packed)


def _is_packed(value: Any) -> bool:
    """True for a PackedSequence, which torch's pytree would take apart as a named tuple."""
    return isinstance(value, PackedSequence)


def example_for(model: nn.Module, given: Any, method: str) -> Example:
    """The arguments of one call of a method.

    Args:
        model: the model; its ``example_input_array`` is taken if nothing is given and the method is ``forward``.
        given: a tensor, a tuple of positional arguments, or a mapping of arguments by name. Tensors go to the CPU.
        method: name of the method.

    Raises:
        ModelError: there are no inputs, no tensor among them, or the method does not take them.
    """
    name = type(model).__name__
    refuse_without_forward(model, method)
    if given is None and method == "forward":
        given = getattr(model, "example_input_array", None)
    if given is None:
        advice = "set example_input_array in __init__, or " if method == "forward" else ""
        raise ModelError(
            f"{name}.{method} is to be exported and there is no example of its inputs: {advice}give example_inputs "
            "(--example package.module:function, or --shape 1x3x32x32): a tensor, a tuple of arguments, or a dict of "
            "arguments by name"
        )
    args, kwargs = as_arguments(copies_on_cpu(given))
    function = getattr(model, method, None)
    if not callable(function):
        raise ModelError(f"{name} has no method {method!r}")
    try:
        example = Example(args, kwargs, named_arguments(function, args, kwargs))
    except TypeError as error:
        raise ModelError(f"{name}.{method} does not take the example inputs: {error}") from error
    _refuse_others(example, f"{name}.{method}")
    return example


def named_arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, as :class:`Example` has them in ``parameters``.

    Raises:
        TypeError: the function does not take them.
    """
    signature = inspect.signature(function)
    found = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            found |= found.pop(name, {})
    return found


def _refuse_others(example: Example, name: str) -> None:
    """Check that the inputs are what graphs take: dense tensors, and plain values."""
    for where, leaf in flat_names(example.parameters):
        if isinstance(leaf, PackedSequence):
            raise ModelError(
                f"the example input {where} of {name} is a PackedSequence, and graphs have none: let a method take the "
                "padded sequences, and their lengths as a tensor, and name it as method="
            )
        if isinstance(leaf, Tensor) and (leaf.layout is not torch.strided or leaf.is_nested):
            kind = "nested" if leaf.is_nested else "sparse"
            raise ModelError(
                f"the example input {where} of {name} is a {kind} tensor, and graphs take dense ones alone"
            )
        if not isinstance(leaf, PLAIN):
            raise ModelError(
                f"the example input {where} of {name} is a {type(leaf).__name__}, which graphs do not take: let a "
                "method take tensors, and tuples, lists and dicts of them, and name it as method="
            )
    if not example.tensors():
        raise ModelError(f"the example inputs of {name} hold no tensor")


def refuse_without_forward(model: nn.Module, method: str = "forward") -> None:
    """Check that what is exported is there: a LightningModule may have steps alone, and its network in an attribute.

    Raises:
        ModelError: it is ``forward``, and the class has none of its own.
    """
    inherited = getattr(getattr(model, method), "__qualname__", "") if hasattr(model, method) else ""
    if method == "forward" and inherited in ("LightningModule.forward", "_forward_unimplemented"):
        name = type(model).__name__
        part = next((part for part, _ in model.named_children()), "net")
        raise ModelError(
            f"{name} has no forward, which is what is exported: write one, such as `return self.{part}(x)`, or export "
            f"the module that has it, as in export(model.{part}, path, example_inputs)"
        )


def parameters_of_call(model: nn.Module, method: str) -> list[str]:
    """The names of the parameters of a method."""
    return list(inspect.signature(getattr(model, method)).parameters)


def as_arguments(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional arguments, and those by name, of inputs as users give them."""
    if isinstance(given, Mapping):
        return (), {str(name): value for name, value in given.items()}
    several = isinstance(given, tuple) and not isinstance(given, PackedSequence)
    return (tuple(given), {}) if several else ((given,), {})


def resized(example: Example, sizes: Mapping[str, Mapping[int, int]], seed: int) -> Example:
    """Random inputs like those of the example, of other sizes.

    A tensor of floats gets values with the mean and the deviation of the example's. One of whole numbers (tokens,
    masks, lengths, whatever its dtype) or with values that are not finite gets rows of the example, drawn at random
    (in order, if they are, as offsets are), and of further dimensions the first places, since other values might mean
    nothing.

    Args:
        example: the example.
        sizes: the new size of each dimension that changes, by the name of the tensor.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def change(name: str, tensor: Tensor) -> Tensor:
        changes = sizes.get(name, {})
        if not changes:
            return tensor
        if not _is_continuous(tensor):
            return _taken(tensor, changes, generator)
        shape = [changes.get(place, size) for place, size in enumerate(tensor.shape)]
        values = tensor.double()
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (values.mean() + values.std(correction=0) * drawn).to(tensor.dtype)

    return example.with_tensors(change)


def _is_continuous(tensor: Tensor) -> bool:
    """True for floats that are not all whole numbers."""
    return tensor.is_floating_point() and bool(tensor.isfinite().all()) and bool((tensor != tensor.round()).any())


def _taken(tensor: Tensor, sizes: Mapping[int, int], generator: torch.Generator) -> Tensor:
    for place, size in sizes.items():
        before = tensor.shape[place]
        rows = place == 0
        index = torch.randint(before, (size,), generator=generator) if rows else torch.arange(size) % before
        ordered = rows and tensor.dim() == 1 and not (tensor.is_floating_point() or tensor.is_complex())
        if ordered and bool((tensor[1:] >= tensor[:-1]).all()):  # offsets, which stay in order
            index = index.sort().values.index_fill(0, torch.tensor([0]), 0)
        tensor = tensor.index_select(place, index)
    return tensor
