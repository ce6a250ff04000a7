"""Where in a model the layers are that can be quantized: who holds them, under which names, tied to what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy
from torch.nn.utils import parametrize

from tinyq_lightning.layers import (
    Candidate,
    Int8Matrix,
    Kind,
    MatrixPlace,
    QuantizedLayer,
    WeightSize,
    bare_matrix,
    has_inner_layers,
    kind_of,
    sources_of,
    why_closed,
)
from tinyq_lightning.plan.references import CompiledPlace, Place, find_references, place_in
from tinyq_lightning.plan.ties import MemoryMap, weights_of
from tinyq_lightning.plan.wrappers import WRAPPERS

__all__ = [
    "Attention",
    "Site",
    "find_sites",
    "is_metric",
]

_Places = tuple[Place | CompiledPlace | MatrixPlace, ...]


_EncoderLayers = tuple[tuple[nn.TransformerEncoderLayer, int], ...]


@dataclass(frozen=True)
class Attention:
    """A float module that holds its layers as bare matrices, and what takes its place if one of them is quantized."""

    module: nn.Module
    opened: nn.Module
    places: _Places


@dataclass(frozen=True)
class Site:
    """A layer that can be quantized or is, and every place in the model that holds it.

    Attributes:
        kind: of the layer: how it is made, counted and restored.
        module: the layer. For a projection of ``nn.MultiheadAttention`` and for what is no ``nn.Linear`` but computes
            the same, a Linear that holds the same parameters.
        original: what the model holds where nothing is quantized: :attr:`module`, or what it stands for.
        names: its dotted paths.
        places: where it is held.
        weights: by the name of each weight in :attr:`module`, where it is: a module, and the parameter's name there.
        attention: for a projection, what it is a part of.
        encoder_layers: each ``nn.TransformerEncoderLayer`` above it, with its ``activation_relu_or_gelu``.
        why_float: why it cannot be quantized without a change of meaning; None if it can.
        tied: names of the other layers with the very same weights.
    """

    kind: Kind
    module: nn.Module
    original: nn.Module
    names: tuple[str, ...]
    places: _Places
    weights: Mapping[str, tuple[nn.Module, str]]
    attention: Attention | None = None
    encoder_layers: _EncoderLayers = ()
    why_float: str | None = None
    tied: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The first of its dotted paths; empty where the layer is the whole model."""
        return self.names[0]

    @property
    def is_quantized(self) -> bool:
        """Whether it holds codes already."""
        return isinstance(self.module, QuantizedLayer)

    @property
    def is_lazy(self) -> bool:
        """Whether a weight has no shape yet."""
        return any(isinstance(self.module._parameters.get(name), UninitializedParameter) for name in self.weights)

    @property
    def is_parametrized(self) -> bool:
        """Whether a weight is made anew each time that it is read."""
        return parametrize.is_parametrized(self.module)

    @property
    def computed_from(self) -> frozenset[str]:
        """The weights that are no parameters, and the parameters and buffers that hooks or the forward compute from."""
        sources = {name: sources_of(self.module, name) for name in self.weights}
        return frozenset(each for name, found in sources.items() if found for each in (name, *found))

    @property
    def sizes(self) -> Mapping[str, WeightSize]:
        """Of each weight, by what the layer tells of itself."""
        return self.kind.sizes(self.module)

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that the quantized layer can have."""
        return self.kind.methods_of(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of the weights, or the one that a quantized layer stands for."""
        if isinstance(self.module, QuantizedLayer):
            return self.module.dtype
        return next(iter(self.weights_like.values())).dtype

    @cached_property
    def weights_like(self) -> Mapping[str, Tensor]:
        """The weights of a float layer without their values, on the meta device."""
        return {
            name: weight
            if isinstance(weight, UninitializedParameter)
            else torch.empty(weight.shape, dtype=weight.dtype, device="meta")
            for name, weight in self.kind.float_weights(self.module).items()
        }

    @property
    def training(self) -> bool:
        """Whether the layer, or the attention it is a part of, is in training mode."""
        return self.attention.module.training if self.attention else self.original.training

    def put(self, layer: nn.Module) -> None:
        """Put ``layer`` into every place; the model's own layer if ``layer`` is :attr:`module`."""
        back = layer is self.module
        for place in self.places:
            place.put(self.original if back else layer)
        if not back:
            self.open()
            return
        if self.attention:
            for place in self.attention.places:
                place.put(self.attention.module)
        for encoder_layer, value in self.encoder_layers:
            encoder_layer.activation_relu_or_gelu = value

    def open(self) -> None:
        """Have what is above the layer call it as a module, whether it is float or quantized."""
        if self.attention:
            self.attention.opened.training = self.training
            for place in self.attention.places:
                place.put(self.attention.opened)
        for encoder_layer, _ in self.encoder_layers:
            # 0 has its forward call the layers. Otherwise, in eval mode, it hands their float weights to a
            # fused kernel: made anew from the codes on each call.
            encoder_layer.activation_relu_or_gelu = 0


def find_sites(model: nn.Module, is_named: Callable[[str], bool] = lambda path: False) -> list[Site]:
    """All layers of ``model`` that can be quantized or are, each once, with all of its places.

    Those are the layers of ``kinds.KINDS``, and the parameters of other modules that are asked for. Networks inside a
    metric of torchmetrics measure the model and are no part of it. Nothing is changed, and no values are looked at.

    Args:
        model: where to look.
        is_named: whether a parameter of this dotted path that no layer has, of two dimensions or more, is one too.
    """
    found: dict[int, _Found] = {}
    for parent, attribute, path, above in _walk(model):
        module = model if parent is None else parent._modules[attribute]
        assert module is not None
        entry = found.setdefault(id(module), _Found(module))
        entry.add(parent, attribute, path, above)
    sites = [site for entry in found.values() for site in _sites_of(entry)]
    taken = {id(tensor) for site in sites for place in site.weights.values() for tensor, _ in weights_of(*place)}
    sites += [site for entry in found.values() for site in _matrices_of(entry, is_named, taken)]
    return _with_references(_with_ties(sites, model), model)


def is_metric(module: nn.Module) -> bool:
    """Whether a module is a metric of torchmetrics, known by the names of its classes: nothing is imported."""
    return any(
        each.__name__ == "Metric" and each.__module__.partition(".")[0] == "torchmetrics"
        for each in type(module).__mro__
    )


@dataclass
class _Found:
    """A module and where the walk came by it."""

    module: nn.Module
    names: list[str] = field(default_factory=list)
    parents: list[tuple[nn.Module, str]] = field(default_factory=list)
    above: list[nn.Module] = field(default_factory=list)

    def add(self, parent: nn.Module | None, attribute: str, path: str, above: tuple[nn.Module, ...]) -> None:
        if path not in self.names:
            self.names.append(path)
        if parent is not None and not any(holder is parent and name == attribute for holder, name in self.parents):
            self.parents.append((parent, attribute))
        self.above.extend(above)


def _walk(model: nn.Module) -> Iterator[tuple[nn.Module | None, str, str, tuple[nn.Module, ...]]]:
    """The model, then every (parent, attribute, dotted path, modules above) in it, a shared child at each place."""
    yield None, "", "", ()
    yield from _walk_below(model, "", ())


def _walk_below(
    module: nn.Module, prefix: str, above: tuple[nn.Module, ...]
) -> Iterator[tuple[nn.Module, str, str, tuple[nn.Module, ...]]]:
    if has_inner_layers(module):
        return
    above = (*above, module)
    for attribute, child in module._modules.items():
        if child is None or any(child is each for each in above) or is_metric(child):
            continue
        path = prefix if attribute in WRAPPERS else f"{prefix}.{attribute}".removeprefix(".")
        yield module, attribute, path, above
        yield from _walk_below(child, path, above)


def _sites_of(found: _Found) -> Iterator[Site]:
    module, names = found.module, tuple(found.names)
    kind = kind_of(module)
    if kind is None:
        return
    places = tuple(place_in(parent, attribute) for parent, attribute in found.parents)
    layers = {id(each): each for each in found.above if isinstance(each, nn.TransformerEncoderLayer)}
    fused = [each for each in layers.values() if each.activation_relu_or_gelu]
    encoder_layers = tuple((each, each.activation_relu_or_gelu) for each in fused)
    if isinstance(module, QuantizedLayer):
        if isinstance(module, Int8Matrix):  # users know it by the name of the parameter
            names = tuple(f"{name.rpartition('.')[0]}.{module.parameter}".removeprefix(".") for name in names)
        yield Site(kind, module, module, names, places, module.code_places())
        return
    closed = next((why for parent, _ in found.parents if (why := why_closed(parent))), None)
    candidates = list(kind.candidates(module, closed))
    opened = next((each.opened for each in candidates if each.opened is not None), None)
    attention = None if opened is None else Attention(module, opened, places)
    for each in candidates:
        yield _site(each, module, names, places, attention, encoder_layers)


def _matrices_of(found: _Found, is_named: Callable[[str], bool], taken: set[int]) -> Iterator[Site]:
    """The parameters of a module that are named and no layer has."""
    module = found.module
    for name, parameter in module._parameters.items():
        if parameter is None or is_lazy(parameter) or parameter.dim() < 2 or id(parameter) in taken:
            continue
        paths = [f"{path}.{name}".removeprefix(".") for path in found.names]
        if any(is_named(path) for path in paths) and not isinstance(module, QuantizedLayer):
            each = bare_matrix(module, name)
            place = MatrixPlace(module, name, parameter, tuple(module._parameters))
            yield Site(
                each.kind, each.layer, each.layer, tuple(paths), (place,), each.weights, why_float=each.why_float
            )


def _site(
    each: Candidate,
    module: nn.Module,
    names: tuple[str, ...],
    places: _Places,
    attention: Attention | None,
    encoder_layers: _EncoderLayers,
) -> Site:
    if each.part:
        names = tuple(f"{name}.{each.part}".removeprefix(".") for name in names)
        places = () if attention is None else (Place(attention.opened._modules, each.part),)
    original = each.layer if each.part else module
    return Site(each.kind, each.layer, original, names, places, each.weights, attention, encoder_layers, each.why_float)


def _with_ties(sites: list[Site], model: nn.Module) -> list[Site]:
    """The sites with their ties; float, if another shares some of their memory and is not a layer of the same codes."""
    memory = MemoryMap(model)
    owners = {(id(module), name): site for site in sites for module, name in site.weights.values()}
    tied = []
    for site in sites:
        partners: list[dict[str, str]] = []  # by name, for each weight
        others = []
        for weight, (holder, attribute) in site.weights.items():
            found: dict[str, str] = {}
            for tensor, owner in weights_of(holder, attribute):
                for module, name, path, same in memory.holders(tensor):
                    own = owner is not holder or name == attribute or name in sources_of(holder, attribute)
                    if module is owner and same and own:
                        continue
                    partner = owners.get((id(module), name))
                    if partner is None or not same or not _shares(site, weight, partner, (module, name)):
                        computed = partner is not None and _computes(site, partner)
                        others.append(path + ", of which layers compute weights of their own" * computed)
                    elif partner is not site:
                        found[partner.name] = path
            partners.append(found)
        whole = [each for each in partners[0] if all(each in found for found in partners)]
        others += [path for found in partners for each, path in found.items() if each not in whole]
        why = site.why_float or (f"tied to {others[0]}" if others else None)
        tied.append(replace(site, tied=tuple(whole), why_float=why))
    return tied


def _shares(site: Site, weight: str, partner: Site, place: tuple[nn.Module, str]) -> bool:
    """Whether two layers would have the same codes for a tensor that is a weight of both."""
    if _computes(site, partner):
        return False
    names = list(partner.weights)
    other = next(name for name, (module, held) in partner.weights.items() if module is place[0] and held == place[1])
    if names.index(other) != list(site.weights).index(weight) or len(names) != len(site.weights):
        return False
    if _is_turned(partner, other) != _is_turned(site, weight):
        return False
    return site.is_lazy or partner.is_lazy or partner.sizes[other] == site.sizes[weight]


def _computes(*sites: Site) -> bool:
    """Whether one of the layers computes its weight from others that it holds."""
    return any(sources_of(holder, name) for site in sites for holder, name in site.weights.values())


def _is_turned(site: Site, weight: str) -> bool:
    """Whether the model holds a weight as ``[in, out]``."""
    holder, name = site.weights[weight]
    held, own = holder._parameters.get(name), site.module._parameters.get(weight)
    return held is not None and own is not None and (held.shape, held.stride()) != (own.shape, own.stride())


def _with_references(sites: Sequence[Site], model: nn.Module) -> list[Site]:
    """The sites with the lists and dicts that hold them too; float, where something else holds them."""
    free = [site for site in sites if not (site.why_float or site.is_quantized or site.is_lazy)]
    layers = [site.original for site in free] + [site.attention.module for site in free if site.attention]
    references = find_references(model, layers)
    found = []
    for site in sites:
        own = references.get(id(site.original), []) if site.why_float is None else []
        above = references.get(id(site.attention.module), []) if site.attention and site.why_float is None else []
        fixed = next((each.where for each in (*own, *above) if each.place is None), None)
        if fixed is not None:
            site = replace(site, why_float=f"{fixed} holds it too, where it cannot be replaced")
        elif own or above:
            site = replace(site, places=(*site.places, *(each.place for each in own if each.place)))
            if above and site.attention:
                more = tuple(each.place for each in above if each.place)
                site = replace(site, attention=replace(site.attention, places=(*site.attention.places, *more)))
        found.append(site)
    return found
