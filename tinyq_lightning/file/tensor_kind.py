"""What a tensor is beyond its values: a parameter, a buffer, or one with a gradient, as a module would register it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

__all__ = [
    "kind_of_tensor",
    "with_kind",
]

_KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "Parameter": nn.Parameter,
    "Parameter without gradient": lambda values: nn.Parameter(values, requires_grad=False),
    "Buffer": nn.Buffer,
    "Buffer that is not persistent": lambda values: nn.Buffer(values, persistent=False),
    "tensor with gradient": Tensor.requires_grad_,
}


def kind_of_tensor(value: Tensor) -> str:
    """The name of its kind; empty for a plain tensor."""
    if isinstance(value, nn.Parameter):
        return "Parameter" if value.requires_grad else "Parameter without gradient"
    if isinstance(value, nn.Buffer):
        return "Buffer" if value.persistent else "Buffer that is not persistent"
    return "tensor with gradient" if value.requires_grad else ""


def with_kind(values: Tensor, kind: str) -> Tensor:
    """A plain tensor as one of a kind, over the same memory.

    Raises:
        KeyError: there is no such kind.
        TypeError: it is no tensor.
        RuntimeError: its dtype has no gradients, and the kind has.
    """
    if type(values) is not Tensor:  # nn.Parameter(None) is an empty one
        raise TypeError(type(values).__name__)
    return _KINDS[kind](values)
