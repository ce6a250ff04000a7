"""How much of all weights of a model a plan quantizes, in bytes, and what holds the others."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tinyq_lightning.methods import METHODS

if TYPE_CHECKING:
    from tinyq_lightning.plan.plan import Decision, Plan

__all__ = [
    "Coverage",
    "HeldWeight",
    "coverage_of",
    "file_coverage",
    "held_weights",
]

_SHOWN = 3  # The types of module that a headline names.


@dataclass(frozen=True)
class HeldWeight:
    """A floating-point tensor of a model; of those that share memory, the first.

    Attributes:
        path: its dotted name.
        type_name: the class of the module that holds it, or what it is called where that is not known.
        bytes: what it takes.
        is_matrix: whether it has two dimensions or more.
    """

    path: str
    type_name: str
    bytes: int
    is_matrix: bool


@dataclass(frozen=True)
class Coverage:
    """The bytes of all weights of a model, weights and biases as floats, those that are shared counted once.

    Attributes:
        label: of the plan.
        quantized_bytes: of the layers that the plan quantizes.
        float_bytes: of all that stays float, by the type of the module that holds it; by one name where
            types are not known. The largest comes first.
        quantized_layers: the number of layers that the plan quantizes.
        layers: the number of layers of the plan, and of the other modules that hold a matrix or more.
        bits: of the codes, from the fewest; none where nothing is quantized.
        others: the number of layers by another method than the label's, whose kind lacks that one.
    """

    label: str
    quantized_bytes: int
    float_bytes: Mapping[str, int]
    quantized_layers: int
    layers: int
    bits: tuple[int, ...] = (8,)
    others: Mapping[str, int] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Of all weights."""
        return self.quantized_bytes + sum(self.float_bytes.values())

    def __str__(self) -> str:
        """``94.7 % of the weight bytes in int8 (w8a32), 19 of 20 layers; in float 5.3 % Conv2d``."""
        total = self.total_bytes or 1
        held = " and ".join(f"int{bits}" for bits in self.bits) or "int8"
        methods = ", ".join([self.label, *(f"{count} by {name}" for name, count in self.others.items())])
        text = f"{_percent(self.quantized_bytes / total)} of the weight bytes in {held} ({methods}), "
        text += f"{self.quantized_layers} of {self.layers} layer{'s' * (self.layers != 1)}"
        named = [(name, size) for name, size in self.float_bytes.items() if size]
        shown = [f"{_percent(size / total)} {name}" for name, size in named[:_SHOWN]]
        if rest := sum(size for _, size in named[_SHOWN:]):
            shown.append(f"{_percent(rest / total)} other")
        return f"{text}; in float {', '.join(shown)}" if shown else text


def held_weights(model: nn.Module) -> tuple[HeldWeight, ...]:
    """The parameters of a model, with values or without on the meta device."""
    named = (
        (f"{path}.{name}" if path else name, _type_name(model, path), parameter)
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and not is_lazy(parameter)
    )
    return tuple(_held(named))


def file_coverage(plan: Plan, state_dict: Mapping[str, Any]) -> Coverage:
    """How much of a file is quantized by ``plan``: its entries tell no types, and floating-point buffers count.

    Args:
        plan: of the model.
        state_dict: float or quantized.
    """
    floats = (
        (path, "other entries, buffers among them", value)
        for path, value in state_dict.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    )
    return coverage_of(plan, _held(floats))


def _held(named: Iterable[tuple[str, str, Tensor]]) -> Iterator[HeldWeight]:
    known: set[tuple[int, Any]] = set()
    for path, type_name, tensor in named:
        has_memory = tensor.layout == torch.strided and not tensor.is_meta and not is_traceable_wrapper_subclass(tensor)
        place = (tensor.untyped_storage()._cdata, tensor.storage_offset()) if has_memory else (id(tensor), 0)
        if place not in known:
            known.add(place)
            yield HeldWeight(path, type_name, tensor.numel() * tensor.element_size(), tensor.dim() > 1)


def coverage_of(plan: Plan, held: Iterable[HeldWeight]) -> Coverage:
    """How much of some weights is quantized by ``plan``."""
    decisions = {name: decision for decision in plan for name in (decision.name, *decision.aliases)}
    left: dict[str, int] = defaultdict(int)
    others: set[str] = set()
    for weight in held:
        decision = _decision_of(weight.path, decisions)
        if decision is not None and decision.method != "float":
            continue
        left[weight.type_name] += weight.bytes
        if decision is None and weight.is_matrix:
            others.add(weight.path.rpartition(".")[0])
    quantized = [decision for decision in plan if decision.method != "float"]
    return Coverage(
        label=plan.label,
        quantized_bytes=sum(decision.float_bytes for decision in quantized),
        float_bytes=dict(sorted(left.items(), key=lambda item: -item[1])),
        quantized_layers=len(quantized),
        layers=len(plan) + len(others),
        bits=tuple(sorted({METHODS[decision.method].bits for decision in quantized})),
        others=Counter(each.method for each in quantized if each.method != plan.label) if plan.label in METHODS else {},
    )


def _decision_of(path: str, decisions: Mapping[str, Decision]) -> Decision | None:
    """The decision on the layer that holds a tensor.

    A projection ``A.in_proj`` of attention holds ``A.in_proj_weight`` and ``A.in_proj_bias``; where keys have
    another size, the projections are ``A.q_proj`` and so on, and the bias is still one.
    """
    for ending, layer in (("_weight", ""), ("_bias", ""), ("in_proj_bias", "q_proj")):
        if path.endswith(ending) and (name := path.removesuffix(ending) + layer) in decisions:
            return decisions[name]
    while path and path not in decisions:
        path = path.rpartition(".")[0]
    return decisions.get(path)


def _type_name(model: nn.Module, path: str) -> str:
    """The class of the module at ``path``, by the name that users write; torch makes subclasses of some.

    Of a user's module with layers in it, which is none itself, ``parameters of`` the class.
    """
    owner = model.get_submodule(path.partition(".parametrizations.")[0])
    name = type(owner).__name__.removeprefix("Parametrized").removeprefix("NonDynamicallyQuantizable")
    is_layer = type(owner).__module__.startswith("torch.") or next(owner.children(), None) is None
    return name if is_layer else f"parameters of {name}"


def _percent(share: float) -> str:
    if share in (0, 1):
        return f"{share:.0%}".replace("%", " %")
    return f"{min(99.9, max(0.1, 100 * share)):.1f} %"
