"""Where in a model the layers are that can be quantized: who holds them, under which names, tied to what."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from tinyq_lightning.layers import (
    Int8Weight,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedMultiheadAttention,
    float_weight,
    in_projections,
    linear_with,
)
from tinyq_lightning.plan.ties import MemoryMap, weights_of

__all__ = [
    "Attention",
    "Site",
    "dtype_of",
    "find_sites",
    "is_conv1d",
    "is_layer",
    "shape_of",
]

Layer = nn.Linear | nn.Embedding | QuantizedLinear | QuantizedEmbedding


_Places = tuple[tuple[nn.Module, str], ...]


_EncoderLayers = tuple[tuple[nn.TransformerEncoderLayer, int], ...]


@dataclass(frozen=True)
class Attention:
    """A float ``nn.MultiheadAttention``, and what takes its place where a projection of it is quantized."""

    module: nn.MultiheadAttention
    opened: QuantizedMultiheadAttention
    places: _Places


@dataclass(frozen=True)
class Site:
    """A layer that can be quantized or is, and every place in the model that holds it.

    Attributes:
        module: the layer. For a projection of ``nn.MultiheadAttention`` and for Hugging Face's
            ``Conv1D``, a Linear that holds the same parameters.
        names: its dotted paths.
        places: the modules that hold it, with the attribute.
        parameter: where its weight is: a module, and the parameter's name there.
        attention: for a projection, what it is a part of.
        encoder_layers: each ``nn.TransformerEncoderLayer`` above it, with its ``activation_relu_or_gelu``.
        why_float: why it cannot be quantized without a change of meaning; None where it can.
        tied: names of the other layers with the very same weight.
    """

    module: Layer
    names: tuple[str, ...]
    places: _Places
    parameter: tuple[nn.Module, str]
    attention: Attention | None = None
    encoder_layers: _EncoderLayers = ()
    why_float: str | None = None
    tied: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The first of its dotted paths; empty where the layer is the whole model."""
        return self.names[0]

    @property
    def is_parametrized(self) -> bool:
        """Whether its weight is made anew each time that it is read."""
        return parametrize.is_parametrized(self.module)

    @cached_property
    def weight_like(self) -> Tensor:
        """The weight of a float layer without its values, on the meta device."""
        weight = float_weight(self.module)
        if isinstance(weight, UninitializedParameter):
            return weight
        return torch.empty(weight.shape, dtype=weight.dtype, device="meta")

    @property
    def is_embedding(self) -> bool:
        """Whether rows are looked up in it."""
        return isinstance(self.module, nn.Embedding | QuantizedEmbedding)

    @property
    def original(self) -> nn.Module:
        """What the model holds where nothing is quantized: :attr:`module`, or the ``Conv1D``."""
        return self.module if self.attention else self.parameter[0]

    @property
    def training(self) -> bool:
        """Whether the layer, or the attention it is a part of, is in training mode."""
        return self.attention.module.training if self.attention else self.original.training

    def put(self, layer: nn.Module) -> None:
        """Put ``layer`` into every place; what was there before where it is :attr:`module`."""
        back = layer is self.module
        for parent, attribute in self.places:
            _set_child(parent, attribute, self.original if back else layer)
        if not back:
            self.open()
            return
        if self.attention:
            for parent, attribute in self.attention.places:
                _set_child(parent, attribute, self.attention.module)
        for encoder_layer, value in self.encoder_layers:
            encoder_layer.activation_relu_or_gelu = value

    def open(self) -> None:
        """Have what is above the layer call it as a module, whether it is float or quantized."""
        if self.attention:
            self.attention.opened.training = self.training
            for parent, attribute in self.attention.places:
                _set_child(parent, attribute, self.attention.opened)
        for encoder_layer, _ in self.encoder_layers:
            # With 0 its forward calls the layers. Otherwise it passes their weights to a fused kernel in eval mode.
            encoder_layer.activation_relu_or_gelu = 0


def _set_child(parent: nn.Module, attribute: str, child: nn.Module) -> None:
    parent._modules[attribute] = child
    if attribute == "_orig_mod" and hasattr(parent, "_initialize"):  # torch.compile's wrapper keeps calling the former
        parent._initialize()  # type: ignore[operator]


def is_layer(module: object) -> bool:
    """Whether ``module`` would itself be replaced, which takes a parent that holds it."""
    if isinstance(module, Int8Weight):
        return False  # although a QuantizedLinear is an nn.Linear
    return isinstance(module, nn.Linear | nn.MultiheadAttention) or is_conv1d(module)


def find_sites(model: nn.Module, embeddings: Collection[str] = ()) -> list[Site]:
    """All layers of ``model`` that can be quantized or are, each once, with all of its places.

    Those are ``nn.Linear`` and its subclasses, the projections of ``nn.MultiheadAttention``, Hugging
    Face's ``Conv1D``, and each ``nn.Embedding`` that one of these is tied to. Nothing is changed, and
    no values are looked at.

    Args:
        model: where to look.
        embeddings: names of embeddings to count in though nothing is tied to them.
    """
    found: dict[int, _Found] = {}
    for parent, attribute, path, above in _walk(model):
        module = model if parent is None else parent._modules[attribute]
        assert module is not None
        entry = found.setdefault(id(module), _Found(module, [], [], []))
        entry.add(parent, attribute, path, above)
    sites = [site for entry in found.values() for site in _sites_of(entry)]
    return _with_ties(sites, model, embeddings)


@dataclass
class _Found:
    """A module and where the walk came by it."""

    module: nn.Module
    names: list[str]
    places: list[tuple[nn.Module, str]]
    above: list[nn.Module]

    def add(self, parent: nn.Module | None, attribute: str, path: str, above: tuple[nn.Module, ...]) -> None:
        if path not in self.names:
            self.names.append(path)
        if parent is not None and not any(holder is parent and name == attribute for holder, name in self.places):
            self.places.append((parent, attribute))
        self.above.extend(above)


def _walk(model: nn.Module) -> Iterator[tuple[nn.Module | None, str, str, tuple[nn.Module, ...]]]:
    """The model, then every (parent, attribute, dotted path, modules above) in it, a shared child at each place."""
    yield None, "", "", ()
    yield from _walk_below(model, "", ())


def _walk_below(
    module: nn.Module, prefix: str, above: tuple[nn.Module, ...]
) -> Iterator[tuple[nn.Module, str, str, tuple[nn.Module, ...]]]:
    opened = isinstance(module, QuantizedMultiheadAttention)
    if isinstance(module, nn.MultiheadAttention) and not opened and _why_closed(module) is None:
        return  # its projections come with it
    above = (*above, module)
    for attribute, child in module._modules.items():
        if child is None or any(child is each for each in above):
            continue
        # torch.compile's wrapper is not a level that users know
        path = prefix if attribute == "_orig_mod" else f"{prefix}.{attribute}".removeprefix(".")
        yield module, attribute, path, above
        yield from _walk_below(child, path, above)


def _sites_of(found: _Found) -> Iterator[Site]:
    module, names, places = found.module, tuple(found.names), tuple(found.places)
    layers = {id(each): each for each in found.above if isinstance(each, nn.TransformerEncoderLayer)}
    fused = [each for each in layers.values() if each.activation_relu_or_gelu]
    encoder_layers = tuple((each, each.activation_relu_or_gelu) for each in fused)
    if isinstance(module, QuantizedLinear | QuantizedEmbedding):
        yield Site(module, names, places, (module, "int8_weights"))
    elif isinstance(module, nn.MultiheadAttention):
        if not isinstance(module, QuantizedMultiheadAttention):
            yield from _projections(module, names, places, encoder_layers)
    elif isinstance(module, nn.Linear):
        above = (each for each, _ in places if isinstance(each, nn.MultiheadAttention))
        why = next((why for each in above if (why := _why_closed(each))), None) or _why_float(module, nn.Linear)
        yield Site(module, names, places, (module, "weight"), None, encoder_layers, why)
    elif isinstance(module, nn.Embedding):
        why = "max_norm rewrites its rows" if module.max_norm is not None else _why_float(module, nn.Embedding)
        yield Site(module, names, places, (module, "weight"), None, encoder_layers, why)
    elif is_conv1d(module):
        weight, bias = module._parameters["weight"], module._parameters["bias"]
        assert weight is not None
        turned = nn.Parameter(weight.detach().t(), requires_grad=weight.requires_grad)
        linear = linear_with(turned, bias).train(module.training)
        why = _why_float(module, type(module))
        yield Site(linear, names, places, (module, "weight"), None, encoder_layers, why)


def _projections(
    module: nn.MultiheadAttention, names: tuple[str, ...], places: _Places, encoder_layers: _EncoderLayers
) -> Iterator[Site]:
    closed = _why_closed(module)
    attention = None if closed else Attention(module, QuantizedMultiheadAttention(module), places)
    inside: nn.Module = attention.opened if attention else nn.ModuleDict(in_projections(module))
    for part, layer in inside._modules.items():
        assert isinstance(layer, nn.Linear)
        holder = (layer, "weight") if part == "out_proj" else (module, f"{part}_weight")
        why = closed or _why_float(layer, nn.Linear)
        below = tuple(f"{name}.{part}".removeprefix(".") for name in names)
        yield Site(layer, below, ((inside, part),), holder, attention, encoder_layers, why)


def is_conv1d(module: object) -> TypeGuard[nn.Module]:
    """Hugging Face's ``Conv1D``: a Linear with the weight ``[in, out]``; known by its looks, not imported."""
    if type(module).__name__ != "Conv1D" or not isinstance(module, nn.Module):
        return False
    weight, width = module._parameters.get("weight"), getattr(module, "nf", None)
    return weight is not None and weight.dim() == 2 and weight.shape[1] == width and "bias" in module._parameters


def _why_closed(module: nn.MultiheadAttention) -> str | None:
    """Why an attention must be left as it is; None where its projections can become layers."""
    if isinstance(module, QuantizedMultiheadAttention):
        return None
    if why := _why_own_way(module, nn.MultiheadAttention):
        return why
    if not isinstance(module.out_proj, nn.Linear) or isinstance(module.out_proj, Int8Weight):
        return f"its out_proj has the type {type(module.out_proj).__name__}"
    held = {*module._modules, *module._buffers, *module._parameters}
    if more := sorted(held - _HELD_BY_ATTENTION):
        return f"it holds {', '.join(more)} besides what nn.MultiheadAttention does"
    return None


_HELD_BY_ATTENTION = {f"{part}_proj_weight" for part in ("in", "q", "k", "v")}


_HELD_BY_ATTENTION |= {"in_proj_bias", "bias_k", "bias_v", "out_proj"}


# What a subclass may define and still be replaced: how it is made and shown, not what it does.
_HARMLESS = {"reset_parameters", "extra_repr", "_version"}


_TELLING = {"__call__", "__getattr__", "__getattribute__", "__setattr__"}


def _why_own_way(module: nn.Module, base: Any) -> str | None:
    """Why a module is more than its torch class, whose behaviour is known; None where it is not."""
    kind: Any = parametrize.type_before_parametrizations(module)
    if kind.forward is not base.forward:
        return f"{kind.__name__} has a forward of its own"
    if "forward" in vars(module):
        return "its forward was replaced"
    own = {name for each in kind.__mro__[: kind.__mro__.index(base)] for name in vars(each)}
    own = {name for name in own - _HARMLESS if not name.startswith("__") or name in _TELLING}
    return f"{kind.__name__} adds {', '.join(sorted(own))} to nn.{base.__name__}" if own else None


def _why_float(module: nn.Module, base: Any) -> str | None:
    """Why a layer, taken for itself, cannot be replaced without a change of meaning; None where it can."""
    weight = module._parameters.get("weight")
    if isinstance(weight, UninitializedParameter):
        return None  # an error, unless it is left float
    if why := _why_own_way(module, base):
        return why
    if parametrize.is_parametrized(module, "weight"):
        return None
    if weight is None:
        hooks = module._forward_pre_hooks.values()
        named = [
            hook for hook in hooks if "weight" in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None))
        ]
        return "its weight is computed by " + (f"the hook {type(named[0]).__name__}" if named else "a hook")
    if type(weight) is not nn.Parameter:
        return f"its weight has the type {type(weight).__name__}"
    return None if weight.layout == torch.strided else f"its weight is {str(weight.layout).removeprefix('torch.')}"


def _with_ties(sites: list[Site], model: nn.Module, embeddings: Collection[str]) -> list[Site]:
    """The sites with their ties, without the embeddings that have none."""
    memory = MemoryMap(model)
    by_parameter = {(id(site.parameter[0]), site.parameter[1]): site for site in sites}
    tied = []
    for site in sites:
        partners, others = [], []
        for tensor, owner in weights_of(*site.parameter):
            for module, name, path, same in memory.holders(tensor):
                partner = by_parameter.get((id(module), name))
                if module is owner and same:
                    continue
                if partner is None or not same or is_conv1d(module) != is_conv1d(owner):
                    others.append(path)
                elif partner is not site:
                    partners.append(partner)
        linears = any(not each.is_embedding for each in partners)
        if isinstance(site.module, nn.Embedding) and not linears and site.name not in embeddings:
            continue
        why = site.why_float or (f"tied to {others[0]}" if others else None)
        tied.append(replace(site, tied=tuple(each.name for each in partners), why_float=why))
    return tied


def shape_of(layer: Layer) -> tuple[int, int]:
    """Rows and columns of the layer's weight: ``[out, in]``, or ``[num, dim]`` of an embedding."""
    if isinstance(layer, nn.Embedding | QuantizedEmbedding):
        return layer.num_embeddings, layer.embedding_dim
    return layer.out_features, layer.in_features


def dtype_of(site: Site) -> torch.dtype:
    """The floating dtype of the layer's weight, or the one that a quantized layer stands for."""
    return site.module.dtype if isinstance(site.module, Int8Weight) else site.weight_like.dtype
