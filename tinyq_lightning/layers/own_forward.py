"""What a subclass of torch's linear and convolutional layers does around the product, in a forward of its own.

timm's ``ScaledStdConv2d`` multiplies by a weight that it standardizes on each call; convolutions ported from TensorFlow
pad by the size of their input. Both are torch's product still: of a weight that does not depend on the input, and of a
padded input. A name does not tell such a class: its forward is run on a small stand-in, the product in it is watched,
and the results are compared with the formula that was read off, at many sizes; then by the layer's own values.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tinyq_lightning.errors import ModelError
from tinyq_lightning.layers.behaviour import (
    SIZES,
    aside,
    forward_takes_one_input,
    gradient,
    near,
    own_functions,
    same,
    writes,
)
from tinyq_lightning.layers.own_padding import OwnPadding
from tinyq_lightning.layers.own_values import holds_for
from tinyq_lightning.layers.watched import PRODUCTS, StopError, Watch, input_for, product_of, torchs_class

__all__ = [
    "OWN_FUNCTIONS",
    "OwnForward",
    "computed_weight",
    "own_forward",
    "padding_of",
]

OWN_FUNCTIONS = ("forward", "_conv_forward")
"""What a subclass may have of its own."""

_MODES = ("constant", "reflect", "replicate", "circular")

# A convolution with a stride has no more ends than these show.
_REMAINDERS = 4

_LARGEST_KERNEL = 4096  # places that one covers; larger ones take seconds to try

_PLAIN = (bool, int, float, str, type(None), torch.dtype)


@dataclass(frozen=True)
class OwnForward:
    """What the forward of a subclass does besides torch's product.

    Attributes:
        sources: the names of the parameters and buffers that it computes its weight from; none if it takes the
            weight as it is.
        padding: what it adds to its input; None if that is what torch's class adds.
    """

    sources: tuple[str, ...] = ()
    padding: OwnPadding | None = None


def own_forward(module: nn.Module) -> OwnForward | None:
    """What a subclass of ``nn.Linear`` or of a convolution does in a forward of its own.

    Returns:
        None if the forward is torch's, or if it is not known to be the product of its input, padded or not, and a
        weight that depends on nothing but the parameters and buffers of the module.
    """
    described = _described(module)
    if described is None:
        return None
    try:
        found = _tried(described)
    except _DrawsError:  # or a thread beside this one drew; so it is not kept
        return None
    return found if found is not None and holds_for(module, found.padding, bool(found.sources)) else None


def padding_of(layer: nn.Module) -> OwnPadding | None:
    """What a convolution, float or quantized, adds to its input in a way of its own; None if torch's class adds it."""
    if isinstance(held := vars(layer).get("own_padding"), OwnPadding):
        return held
    found = own_forward(layer)
    return None if found is None else found.padding


def computed_weight(module: nn.Module) -> Tensor:
    """The weight that a module with :attr:`OwnForward.sources` multiplies by, computed once as in eval mode."""
    base = torchs_class(module)
    assert base is not None
    held = cast(Tensor, module._parameters["weight"])
    twin = object.__new__(type(module))
    vars(twin).update({**vars(module), "training": False})
    watch = Watch(PRODUCTS[base], stops=True)
    device = "cpu" if held.is_meta else held.device.type
    with torch.no_grad(), torch.autocast(device, enabled=False), suppress(StopError), watch:
        type(twin).forward(twin, input_for(twin, 0, held.dtype, held.device))
    if not watch.calls:
        raise ModelError(f"{type(module).__name__} computes no weight for an input of zeros: leave it float")
    return cast(Tensor, watch.calls[0]["weight"])


_Tensors = Mapping[str, "tuple[tuple[int, ...], torch.dtype] | None"]


@dataclass(frozen=True)
class _Described:
    """All that a forward may depend on, but for the values of tensors and the number of channels.

    Attributes:
        kind: the class.
        base: torch's class.
        functions: what the class has of its own.
        dtype: of the weight.
        told: all of the following, as text to compare by.
        attributes: what the module holds besides tensors and modules, of few channels.
        parameters: shape, of few channels, and dtype of each; None for one that is not there.
        buffers: likewise.
        modules: those in it, which hold no tensors. Copies are tried.
    """

    kind: Any
    base: Any
    functions: tuple[Any, ...]
    dtype: torch.dtype
    told: str
    attributes: Mapping[str, Any] = field(compare=False)
    parameters: _Tensors = field(compare=False)
    buffers: _Tensors = field(compare=False)
    modules: Mapping[str, nn.Module | None] = field(compare=False)


def _described(module: nn.Module) -> _Described | None:
    """What is to be known of a module to try its forward; None if it has none of its own, or too much to be known."""
    kind: Any = type(module)
    base: Any = torchs_class(module)
    if base is None or not any(getattr(kind, name, None) is not getattr(base, name, None) for name in OWN_FUNCTIONS):
        return None
    functions = tuple(own_functions(kind, OWN_FUNCTIONS))
    weight = module._parameters.get("weight")
    if weight is None or is_lazy(weight) or not weight.is_floating_point() or not forward_takes_one_input(module):
        return None
    if weight.dim() != len(getattr(module, "kernel_size", ())) + 2 or any(writes(function) for function in functions):
        return None
    below = [_told(each) for child in module.children() for each in child.modules()]
    if None in below:
        return None
    own, small = vars(nn.Module()), _small_sizes(base, module)
    attributes = {name: value for name, value in vars(module).items() if name not in own}
    kernel = zip(getattr(module, "kernel_size", ()), getattr(module, "dilation", ()), strict=True)
    if not _is_plain(list(attributes.values())) or math.prod(gap * width for width, gap in kernel) > _LARGEST_KERNEL:
        return None
    attributes |= {name: size for name, size in small.items() if name in attributes}
    parameters, buffers = (_small_tensors(held, weight, small) for held in (module._parameters, module._buffers))
    outside = [
        {name: value for name in each.__code__.co_names if _is_plain(value := each.__globals__.get(name))}
        for each in functions
        if isinstance(each, FunctionType)
    ]
    told = repr((attributes, parameters, buffers, list(module._modules), below, outside))
    held = dict(module._modules)
    return _Described(kind, base, functions, weight.dtype, told, attributes, parameters, buffers, held)


def _small_sizes(base: Any, module: Any) -> dict[str, int]:
    """Few channels or features, with those equal that are equal in the module, by the attributes that tell them."""
    if base is nn.Linear:
        rows, columns = (4, 4) if module.in_features == module.out_features else (5, 3)
        return {"out_features": rows, "in_features": columns}
    groups, inputs, outputs = module.groups, module.in_channels, module.out_channels
    parts, across = min(groups, 3), min(inputs // groups, 3)
    along = across if inputs == outputs else min(outputs // groups, 5 if groups == 1 else 2)
    return {"out_channels": parts * along, "in_channels": parts * across, "groups": parts}


def _small_tensors(held: Mapping[str, Tensor | None], weight: Tensor, small: Mapping[str, int]) -> _Tensors:
    """Shapes and dtypes of tensors, the shapes with few channels."""
    rows = small.get("out_channels", small.get("out_features", 1))
    columns = small["in_features"] if "in_features" in small else small["in_channels"] // small["groups"]
    known = {weight.shape[1]: columns, weight.shape[0]: rows}
    made: dict[str, tuple[tuple[int, ...], torch.dtype] | None] = {}
    for name, value in held.items():
        if value is None:
            made[name] = None
        elif value.shape == weight.shape:
            made[name] = (rows, columns, *value.shape[2:]), value.dtype
        else:
            made[name] = tuple(known.get(size, size) for size in value.shape), value.dtype
    return made


def _told(module: nn.Module) -> str | None:
    """What a module without tensors depends on, as text to compare by; None if that cannot be known."""
    kind: Any = type(module)
    held = {name: value for name, value in vars(module).items() if name not in vars(nn.Module())}
    functions = {name: value for name, value in held.items() if isinstance(value, FunctionType)}
    plain = {name: value for name, value in held.items() if name not in functions}
    attached = module._parameters or module._buffers or module._forward_hooks or module._forward_pre_hooks
    run: list[Any] = [*own_functions(kind), *functions.values()]
    if attached or not _is_plain(list(plain.values())) or any(writes(each) or each.__closure__ for each in run):
        return None
    return repr(
        (id(kind), plain, [(name, id(each.__code__)) for name, each in functions.items()], list(module._modules))
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(each) for each in value)
    return type(value) in _PLAIN


@lru_cache(maxsize=512)
def _tried(described: _Described) -> OwnForward | None:
    with aside(autocast=False):
        try:
            return _Trial(described).result()
        except _DrawsError:
            raise
        except Exception:  # whatever a forward may raise: it is not the function it is compared with
            return None


class _OtherwiseError(Exception):
    """The forward is not the product with something around it."""


class _DrawsError(_OtherwiseError):
    """Random numbers were drawn meanwhile."""


class _Trial:
    """One class, tried on modules of few channels.

    Args:
        described: the class, and what its module tells of itself.
    """

    def __init__(self, described: _Described) -> None:
        self._described = described
        self._twin = self._made(torch.float64)
        x = input_for(self._twin, 3, torch.float64).normal_(generator=_generator(1))
        output, call = self._run(x)
        self._weight = cast(Tensor, call["weight"]).detach()
        own = self._twin._parameters["weight"]
        assert own is not None
        if self._weight.shape != own.shape or not bool(self._weight.isfinite().all()):
            raise _OtherwiseError
        self._computes = not torch.equal(self._weight, own)
        self._paddings = list(self._possible_paddings(x, call, output))

    def result(self) -> OwnForward:
        """What was found; an error if the forward is another function."""
        for padding in self._paddings:
            if all(self._agrees(padding, index) for index in range(self._amount() + 1)):
                self._check_types(padding)
                return OwnForward(self._sources() if self._computes else (), padding)
        raise _OtherwiseError

    def _amount(self) -> int:
        """How many sizes of input are tried: remainders by the stride in each dimension, and one place."""
        return 5 + 2 * min(max(getattr(self._twin, "stride", (1,))), _REMAINDERS)

    def _agrees(self, padding: OwnPadding | None, index: int) -> bool:
        """Whether the forward and the formula are the same for inputs of one size, in training and in evaluation."""
        for training, scale in itertools.product((False, True), SIZES if index < 2 else (1.0,)):
            self._twin.train(training)
            x = input_for(self._twin, index, torch.float64, amount=self._amount()).normal_(generator=_generator(index))
            x *= scale
            if index == 2:
                x.view(-1)[0] = torch.inf
            wanted = self._formula(x.requires_grad_(), padding)
            try:
                got, call = self._run(x)
            except _OtherwiseError:
                if wanted is None:
                    continue
                return False
            if wanted is None or not same(got, wanted) or not torch.equal(call["weight"], self._weight):
                return False
            if index == 3 and not same(gradient(got, x), gradient(wanted, x)):
                return False
        return True

    def _formula(self, x: Tensor, padding: OwnPadding | None) -> Tensor | None:
        """The product by torch's own class; None if it takes no input of that size."""
        try:
            return product_of(self._described.base, self._twin, x, self._weight.to(x.dtype), padding)
        except (RuntimeError, ValueError):
            return None

    def _check_types(self, padding: OwnPadding | None) -> None:
        """Raise if the forward does not keep the dtype of the layer as torch's does, or does not follow autocast."""
        own, single = self._made(self._described.dtype), self._made(torch.float32)
        x = input_for(own, 3, self._described.dtype).normal_(generator=_generator(2))
        got, call = self._run(x, own)
        wanted = product_of(self._described.base, own, x, call["weight"], padding)
        if not near(got, wanted) or self._run(x.float(), single, autocast=True)[0].dtype != torch.bfloat16:
            raise _OtherwiseError

    def _sources(self) -> tuple[str, ...]:
        """The tensors whose values change the weight."""
        found = []
        for name, value in (*self._twin._parameters.items(), *self._twin._buffers.items()):
            if value is None or name == "bias":
                continue
            held = self._twin._parameters if name in self._twin._parameters else self._twin._buffers
            held[name] = (~value if value.dtype == torch.bool else value + 1) if value.dim() < 2 else value.flip(0, 1)
            _, call = self._run(input_for(self._twin, 3, torch.float64))
            held[name] = value
            if name == "weight" or not torch.equal(call["weight"], self._weight):
                found.append(name)
        return tuple(sorted(found))

    def _run(self, x: Tensor, twin: Any = None, autocast: bool = False) -> tuple[Tensor, dict[str, Any]]:
        """The output of the forward, and the arguments of the product in it."""
        twin = self._twin if twin is None else twin
        watch, before = Watch(PRODUCTS[self._described.base]), dict(vars(twin))
        below = [_told(each) for each in twin.children()]
        with aside(autocast), watch:
            random = torch.get_rng_state()
            try:
                output = type(twin).forward(twin, x)
            except Exception as error:  # whatever a forward may raise: it is not the function it is compared with
                raise _OtherwiseError from error
            draws = not torch.equal(random, torch.get_rng_state())
        changed = any(vars(twin).get(name, before) is not value for name, value in before.items())
        if draws:
            raise _DrawsError
        changed = changed or len(vars(twin)) != len(before) or below != [_told(each) for each in twin.children()]
        if changed or len(watch.calls) != 1 or type(output) is not Tensor:
            raise _OtherwiseError
        if type(watch.calls[0].get("weight")) not in (Tensor, nn.Parameter):
            raise _OtherwiseError
        return output, watch.calls[0]

    def _made(self, dtype: torch.dtype) -> Any:
        """A module of the class, with few channels and random values."""
        described, generator = self._described, _generator(0)
        twin = object.__new__(described.kind)
        nn.Module.__init__(twin)
        vars(twin).update(described.attributes, training=False)
        for name, like in described.parameters.items():
            value = None if like is None else _random(name, *like, dtype, generator)
            twin._parameters[name] = None if value is None else nn.Parameter(value, False)
        for name, like in described.buffers.items():
            twin._buffers[name] = None if like is None else _random(name, *like, dtype, generator)
        twin._modules.update(copy.deepcopy(described.modules))
        return twin

    def _possible_paddings(self, x: Tensor, call: Mapping[str, Any], output: Tensor) -> Iterator[OwnPadding | None]:
        """What the forward may add to its input, by what one call of it shows."""
        yield None
        if self._described.base is nn.Linear:
            return
        yield OwnPadding()
        dims, padded = len(self._twin.kernel_size), cast(Tensor, call["input"])
        around = call.get("padding", 0)
        if padded.dim() != x.dim() or isinstance(around, str):
            return
        around = (around,) * dims if isinstance(around, int) else tuple(around) * (dims // len(tuple(around)))
        sizes, more = x.shape[2:], [a - b for a, b in zip(padded.shape[2:], x.shape[2:], strict=True)]
        if min(more) < 0:
            return
        for begins in itertools.product(*(range(each + 1) for each in more)):
            places: Any = (..., *(slice(at, at + size) for at, size in zip(begins, sizes, strict=True)))
            inner = padded[places]
            if torch.equal(inner, x):
                yield from self._with_ends(begins, more, around, x, output)

    def _with_ends(
        self, begins: tuple[int, ...], more: list[int], around: tuple[int, ...], x: Tensor, output: Tensor
    ) -> Iterator[OwnPadding]:
        """Of each mode; where the output was cut, of an input with less at an end."""
        twin, plain, cut_first, cut_last = self._twin, list[int](), list[int](), list[int]()
        for dim in reversed(range(len(begins))):
            width, gap, step = twin.kernel_size[dim], twin.dilation[dim], twin.stride[dim]
            before, after = begins[dim] + around[dim], more[dim] - begins[dim] + around[dim]
            size = x.shape[2 + dim]
            places = (size + before + after - gap * (width - 1) - 1) // step + 1
            cut = (places - output.shape[2 + dim]) * step
            plain += [before, after]
            cut_first += [before - cut, after]
            cut_last += [before, after - cut]
        for ends in dict.fromkeys((tuple(cut_last), tuple(cut_first), tuple(plain))):
            yield from (OwnPadding(ends, mode) for mode in _MODES)


def _random(
    name: str, shape: tuple[int, ...], own: torch.dtype, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Random values for a parameter or a buffer."""
    if not own.is_floating_point:
        return torch.randint(0, 2, shape, generator=generator).to(own)
    value = torch.rand(shape, dtype=torch.float64, generator=generator)
    value = value - 0.5 if name in ("weight", "bias") else value + 0.5  # a gain may have its root taken
    return value.to(dtype)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
