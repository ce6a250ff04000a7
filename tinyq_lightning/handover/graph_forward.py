"""The forward that is traced: with each argument by name, and outputs that a graph can hold."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tinyq_lightning.handover.example import Example

__all__ = [
    "graph_forward",
]


@contextmanager
def graph_forward(
    module: nn.Module, example: Example, returns: Callable[[Any, Sequence[Tensor]], Any]
) -> Iterator[None]:
    """Context manager in which ``forward`` of a module is as torch.export wants it.

    Args:
        module: the module.
        example: the call. Of ``**kwargs`` its signature has the names that are given, since torch.export cannot tell
            which dimensions of theirs are dynamic.
        returns: makes the outputs of those of the module, and of the tensors that it was given.
    """
    own = module.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        taken = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        return returns(own(*args, **kwargs), taken)

    forward.__signature__ = _named_signature(own, example)  # type: ignore[attr-defined]
    former = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if former is not None:
            vars(module)["forward"] = former


def _named_signature(function: Callable[..., Any], example: Example) -> inspect.Signature:
    signature = inspect.signature(function)
    kept = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    if len(kept) < len(signature.parameters):
        known = {each.name for each in kept}
        more = [name for name in example.kwargs if name not in known]
        kept += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in more]
    return signature.replace(parameters=kept)
