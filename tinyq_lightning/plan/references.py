"""Where a model holds its layers besides in its modules: lists, dicts, attributes, closures, compiled wrappers."""

from __future__ import annotations

import gc
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ProxyTypes, ReferenceType, getweakrefs

import torch
from torch import Tensor, nn

from tinyq_lightning.plan.functions import globals_read
from tinyq_lightning.plan.wrappers import users_path

__all__ = [
    "CompiledPlace",
    "Place",
    "Reference",
    "find_references",
    "place_in",
]


@dataclass(frozen=True)
class Place:
    """An entry of a list or a mapping that holds a layer."""

    container: Any
    key: Any

    def put(self, layer: nn.Module) -> None:
        """Put ``layer`` there."""
        self.container[self.key] = layer


@dataclass(frozen=True)
class CompiledPlace:
    """The wrapper that ``torch.compile`` makes around a layer: its forward calls the layer that it was made for."""

    wrapper: Any
    forward: Any
    layer: nn.Module

    def put(self, layer: nn.Module) -> None:
        """Have the wrapper call ``layer``, compiled; as it was, where that is the one it was made for."""
        self.wrapper._modules["_orig_mod"] = layer
        if layer is self.layer:
            vars(self.wrapper)["forward"] = self.forward
        else:
            self.wrapper._initialize()


def place_in(parent: nn.Module, attribute: str) -> Place | CompiledPlace:
    """The place that a registered child has."""
    if attribute == "_orig_mod" and "forward" in vars(parent) and hasattr(type(parent), "_initialize"):
        return CompiledPlace(parent, vars(parent)["forward"], parent._modules[attribute])  # type: ignore[arg-type]
    return Place(parent._modules, attribute)


@dataclass(frozen=True)
class Reference:
    """A layer held outside of the registered modules.

    Attributes:
        where: dotted path of the attribute it was found below.
        place: where it can be exchanged; None if it cannot, as in a tuple or a closure.
    """

    where: str
    place: Place | None


_EXACT_DICTS = (dict, OrderedDict, defaultdict)
_CONTAINERS = {*_EXACT_DICTS, list, tuple, set}


# What cannot hold a layer.
_LEAVES = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray, type, ModuleType, CodeType, FrameType),
    *(Tensor, torch.dtype, torch.device, torch.Size, BuiltinFunctionType),
)


# Objects of these packages, and of classes that inherit from theirs, are the surroundings of a model: a Trainer, its
# callbacks and loggers, data sets and loaders, optimizers, locks, arrays.
_SURROUNDINGS = {"torch", "torchmetrics", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}
_SURROUNDINGS |= {"tinyq_lightning", "numpy", "pandas", "logging", "threading", "_thread", "omegaconf"}


# Registered children and tensors, which are looked at elsewhere; what Lightning has a module hold of its
# surroundings and arguments; and what torch.compile made of a module, which is made anew for another.
_SKIPPED = {"_modules", "_parameters", "_buffers", "_trainer", "_fabric", "_hparams", "_hparams_initial"}
_SKIPPED |= {"_compiled_call_impl", "_compiler_ctx", "_jit_module"}


# What the wrapper of torch.compile keeps of the module in it: CompiledPlace makes it anew.
_OF_COMPILED = {"forward", "_forward", "dynamo_ctx", "_torchdynamo_orig_callable", "get_compiler_config"}


_MOST_OBJECTS = 50_000


def find_references(model: nn.Module, layers: Collection[nn.Module]) -> Mapping[int, list[Reference]]:
    """By the ``id`` of a layer, where ``model`` holds it outside of its registered modules.

    Containers, functions with what they close over and their globals, and plain objects are followed from each
    attribute of each module and of its class, the nearest first and at most 50,000 of them; functions alone from hooks.
    Nothing is changed.
    """
    found: dict[int, list[Reference]] = defaultdict(list)
    wanted, modules = {id(layer) for layer in layers}, {id(each) for each in model.modules()}
    proxies = {id(each): id(layer) for layer in layers for each in getweakrefs(layer) if type(each) in ProxyTypes}
    seen: set[int] = set()
    pending: deque[_Held] = deque()
    for path, module in model.named_modules():
        attributes = vars(module)
        compiled = "_orig_mod" in module._modules
        for name, value in attributes.items():
            if _holds_none(value) or name in _SKIPPED or (compiled and name in _OF_COMPILED):
                continue
            where = users_path(f"{path}.{name}".removeprefix("."))
            pending.append(_Held(value, where, Place(attributes, name), not name.endswith("_hooks")))
    for kind in {each for module in model.modules() for each in type(module).__mro__}:
        if _package(kind) not in _SURROUNDINGS:
            pending.extend(_Held(value, f"{kind.__name__}.{name}", None, True) for name, value in vars(kind).items())
    while pending and len(seen) < _MOST_OBJECTS:
        held = pending.popleft()
        value = held.value
        if id(value) in wanted:
            found[id(value)].append(Reference(held.where, held.place))
        elif id(value) in proxies:
            found[proxies[id(value)]].append(Reference(held.where, None))
        elif id(value) not in seen and id(value) not in modules and _is_followed(type(value)):
            seen.add(id(value))
            pending.extend(islice(_below(held), _MOST_OBJECTS))
    return found


def _holds_none(value: Any) -> bool:
    """Whether a value is, at first sight, a leaf or empty, as most attributes of a module are."""
    return type(value) in _LEAVES or (type(value) in _CONTAINERS and not value)


@dataclass(frozen=True)
class _Held:
    """A value, where it was found, and whether plain objects are followed from there."""

    value: Any
    where: str
    place: Place | None
    through_objects: bool


def _below(held: _Held) -> Iterator[_Held]:
    for value, place in _contents(held.value, held.through_objects):
        yield _Held(value, held.where, place, held.through_objects)


def _contents(value: Any, through_objects: bool) -> Iterator[tuple[Any, Place | None]]:
    """What a value holds, each with its place if it can be exchanged there."""
    kind = type(value)
    if kind in (list, deque):
        followed = _followed(value)
        if followed:
            yield from ((each, Place(value, index)) for index, each in enumerate(value) if type(each) in followed)
    elif isinstance(value, dict):
        followed = _followed(value.values())
        exact = kind in _EXACT_DICTS
        if followed:
            pairs = ((key, each) for key, each in value.items() if type(each) in followed)
            yield from ((each, Place(value, key) if exact else None) for key, each in pairs)
        if not exact and hasattr(value, "__dict__"):
            yield from ((each, Place(vars(value), key)) for key, each in vars(value).items())
    elif isinstance(value, FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        held += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *vars(value).values()]
        held += [each for _, each in globals_read(value)]
        yield from ((each, None) for each in held)
    elif isinstance(value, ReferenceType):
        yield value(), None
    elif isinstance(value, MethodType):
        yield from ((each, None) for each in (value.__self__, value.__func__))
    elif isinstance(value, nn.Module):  # one that the model does not register
        if through_objects:
            yield from ((each, Place(vars(value), name)) for name, each in vars(value).items())
    elif _package(kind) in ("builtins", "functools", "itertools", "collections"):
        yield from ((each, None) for each in gc.get_referents(value))
    elif through_objects:
        attributes = getattr(value, "__dict__", None)
        if type(attributes) is dict:
            yield from ((each, Place(attributes, name)) for name, each in attributes.items())
        if type(attributes) is not dict or hasattr(kind, "__slots__") or isinstance(value, list | tuple | set):
            yield from ((each, None) for each in gc.get_referents(value) if each is not attributes)


def _followed(values: Iterable[Any]) -> set[type]:
    """The types among ``values`` that may hold a layer or be one: none, for a list of a million numbers."""
    return {kind for kind in set(map(type, values)) if _is_followed(kind)}


def _is_followed(kind: type) -> bool:
    """Whether objects of a class may hold a layer, or are one."""
    if issubclass(kind, _LEAVES):
        return False
    if issubclass(kind, nn.Module | FunctionType | MethodType):
        return True
    return not any(_package(each) in _SURROUNDINGS for each in kind.__mro__)


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
