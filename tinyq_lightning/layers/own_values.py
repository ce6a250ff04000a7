"""Whether what was read off the forward of a small stand-in holds for a layer itself, by its own values and sizes."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from tinyq_lightning.kernels import version_of
from tinyq_lightning.layers.behaviour import aside, near
from tinyq_lightning.layers.own_padding import OwnPadding
from tinyq_lightning.layers.watched import PRODUCTS, Watch, input_for, product_of, torchs_class

__all__ = [
    "holds_for",
]

# What was found of a layer, and the versions of its tensors then: it is asked for many times while a plan is made.
_known: weakref.WeakKeyDictionary[nn.Module, tuple[Any, bool]] = weakref.WeakKeyDictionary()


def holds_for(module: nn.Module, padding: OwnPadding | None, computes: bool) -> bool:
    """Whether the forward of a layer is torch's product of its input and of the weight that it computes, or has.

    A clamp shows in the values only, and a branch in the sizes. Copies are run, for a batch and for a single sample, in
    training and in evaluation. They are not to take what torch's product refuses, as one that flattens its input does.

    Args:
        module: the layer. One on the meta device has no values, and one that is sharded not all of them: such a one is
            what was read off.
        padding: what it adds to its input; None if that is what torch's class adds.
        computes: whether it computes its weight from others.
    """
    tensors = _tensors(module).values()
    if any(each.is_meta or type(each) not in (Tensor, nn.Parameter) for each in tensors):
        return True
    told = padding, computes, [(id(each), version_of(each)) for each in tensors]
    known = _known.get(module)
    if known is None or known[0] != told:
        known = _known[module] = told, _holds(module, padding, computes)
    return known[1]


def _holds(module: nn.Module, padding: OwnPadding | None, computes: bool) -> bool:
    base: Any = torchs_class(module)
    try:
        with aside(autocast=False):
            twin = _copy(module)
            own = twin._parameters["weight"]
            whole = input_for(twin, 0, own.dtype, own.device)
            whole.copy_(torch.randn(whole.shape, generator=torch.Generator().manual_seed(0)))
            weights: list[Tensor] = []
            for training in (False, True):
                nn.Module.train(twin, training)
                for x in (whole, whole[:1]):
                    watch = Watch(PRODUCTS[base])
                    with torch.no_grad(), watch:
                        got = type(twin).forward(twin, x)
                    # a linear layer may multiply by torch.matmul, by its weight as it is
                    weights.append(watch.calls[0]["weight"] if watch.calls or computes else own)
                    wanted = product_of(base, twin, x, weights[0], padding)
                    if not near(got, wanted):
                        return False
            if any(_takes(twin, x) for x in _other_inputs(whole, base)):
                return False
    except Exception:  # whatever a forward may raise: it is another function
        return False
    used = own if not computes else weights[0]
    return all(torch.equal(each, used) for each in weights) and _is_unchanged(twin, module)


def _other_inputs(x: Tensor, base: Any) -> list[Tensor]:
    """Inputs that torch's product refuses: of one more dimension, and of twice the features or channels."""
    twice = torch.cat([x, x], -1 if base is nn.Linear else 1)
    return [twice] if base is nn.Linear and x.shape[-1] == 1 else [x.unsqueeze(-1), twice]


def _takes(twin: Any, x: Tensor) -> bool:
    try:
        with torch.no_grad():
            type(twin).forward(twin, x)
    except Exception:
        return False
    return True


def _copy(module: nn.Module) -> Any:
    """A copy whose tensors and modules are its own, on which a forward may do what it likes."""
    twin: Any = object.__new__(type(module))
    vars(twin).update(vars(module))
    for group in ("_parameters", "_buffers"):
        held = {name: None if each is None else each.detach().clone() for name, each in vars(module)[group].items()}
        vars(twin)[group] = held
    vars(twin)["_modules"] = copy.deepcopy(module._modules)
    return twin


def _is_unchanged(twin: Any, module: nn.Module) -> bool:
    before, after = _tensors(module), _tensors(twin)
    return before.keys() == after.keys() and all(torch.equal(each, after[name]) for name, each in before.items())


def _tensors(module: Any) -> dict[str, Tensor]:
    """The parameters and buffers that a layer itself has."""
    held = {**module._parameters, **module._buffers}
    return {name: each for name, each in held.items() if each is not None}
