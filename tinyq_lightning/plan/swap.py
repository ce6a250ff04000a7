"""Quantized layers put into a model and taken out again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from tinyq_lightning.errors import ModelError
from tinyq_lightning.layers import QuantizedLayer
from tinyq_lightning.methods import METHODS
from tinyq_lightning.plan.bits import method_of
from tinyq_lightning.plan.checks import refuse_root, sites_for
from tinyq_lightning.plan.eight_bits import EightBits
from tinyq_lightning.plan.make_layers import QuantizedLayers
from tinyq_lightning.plan.plan import DecidedBy, Decision
from tinyq_lightning.plan.recoded import Recoded
from tinyq_lightning.plan.resolution import resolve
from tinyq_lightning.plan.sites import Site
from tinyq_lightning.spec import QuantizationSpec

__all__ = [
    "Swap",
]


class Swap:
    """Quantized layers made beside the float ones, to be put in and taken out again.

    Layers of another number of bits are made when a change of method first asks for them, and kept.

    Making it changes nothing in the model. As a context manager it is in inside the block.

    Args:
        model: any module with layers of a known kind somewhere below it.
        spec: what to quantize, and how.

    Attributes:
        plan: the decisions, with the SQNR of each quantized weight.

    Raises:
        SpecError: the spec does not fit the model.
        ModelError: the model is itself a layer, or a weight cannot be quantized.
    """

    def __init__(self, model: nn.Module, spec: QuantizationSpec) -> None:
        refuse_root(model)
        sites = sites_for(spec, model)
        layers = QuantizedLayers(resolve(spec, model, sites=sites))
        made = ((site, layers.make(site)) for site in sites)
        self._pairs: list[tuple[Site, QuantizedLayer]] = [(site, layer) for site, layer in made if layer is not None]
        self.plan = layers.plan
        self._eight_bits = EightBits(self.plan, [site for site, _ in self._pairs])

    def or_refuse(self) -> Swap:
        """Return this swap; refuse one that would put nothing in.

        Raises:
            ModelError: there is nothing, as where the model is quantized already; where a run found
                that no layer is better off quantized, that is what was asked for.
        """
        if not self._pairs and not any(decision.measured for decision in self.plan):
            why = "; ".join(f"{decision.name}: {decision.reason}" for decision in self.plan)
            raise ModelError(f"there is nothing to quantize ({why})")
        return self

    def switched(self, changes: Mapping[str, tuple[str, str]], decided_by: DecidedBy) -> Swap:
        """A swap of the same layers with other methods. Weights of four bits are quantized again if they get eight.

        Args:
            changes: method and reason by the name of a layer that this swap quantizes; ``float`` leaves it
                alone. What shares its weight follows; every other layer is as in this swap.
            decided_by: what the changes come from: ``budget`` or ``timing``.
        """
        other = copy.copy(self)
        other._pairs = []
        of_all_methods = {site.name for site, _ in self._pairs if _takes_all_methods(site)}
        decisions = {decision.name: decision for decision in self.plan}
        for site, layer in self._pairs:
            decision = decisions[site.name]
            source = next((name for name in (site.name, *site.tied) if name in changes), None)
            if source is not None:
                partner = next((name for name in site.tied if name in of_all_methods), source)
                decision = _switched(site, decision, partner, changes[source], decided_by)
                if decision.method != "float":
                    layer = self._with_method(site, layer, decision.method)
                    decision = replace(decision, kernel=layer.choice)
                    if layer.bits != METHODS[decisions[site.name].method].bits:
                        decision = replace(self._eight_bits.sized(site.name, decision), output_error=None)
                decisions[site.name] = decision
            if decision.method != "float":
                other._pairs.append((site, layer))
        other.plan = replace(self.plan, decisions=tuple(decisions.values()))
        return other

    def recoded(self, found: Mapping[str, Recoded]) -> Swap:
        """A swap whose layers have other codes and biases of the same weights.

        Args:
            found: by the name of a layer that this swap quantizes; every other layer is as in this swap.
        """
        other, kernel = copy.copy(self), self.plan.spec.kernel
        other._pairs = [
            (site, found[site.name].layer(site, layer, kernel) if site.name in found else layer)
            for site, layer in self._pairs
        ]
        decisions = (found[each.name].decision(each) if each.name in found else each for each in self.plan)
        other.plan = replace(self.plan, decisions=tuple(decisions))
        return other

    def layer_by(self, name: str, method: str) -> QuantizedLayer:
        """The quantized layer of this name by another method of its kind, of as many bits or of eight."""
        site, layer = next((site, layer) for site, layer in self._pairs if site.name == name)
        return self._with_method(site, layer, method)

    def _with_method(self, site: Site, layer: QuantizedLayer, method: str) -> QuantizedLayer:
        if METHODS[method].bits != layer.bits:
            layer = self._eight_bits.layer(site.name)
        return layer.with_method(method)

    def bytes_by(self, name: str, method: str) -> int:
        """What a layer takes by another method, which may be ``float``; a shared weight counts for the first alone."""
        decision = next(each for each in self.plan if each.name == name)
        if method == "float":
            return decision.float_bytes
        if METHODS[method].bits == METHODS[decision.method].bits:
            return decision.bytes
        return self._eight_bits.bytes(decision)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Float inside the block, with each layer called as a module: no fused kernels that go past them."""
        for site, _ in self._pairs:
            site.open()
        try:
            yield
        finally:
            self.take_out()

    @property
    def fused(self) -> bool:
        """Whether torch may run float layers in fused kernels, which call none of them unless they have hooks."""
        return any(site.attention or site.encoder_layers for site, _ in self._pairs)

    def ties(self) -> dict[str, tuple[str, ...]]:
        """The names of those that share a weight with a layer, by its name."""
        return {site.name: site.tied for site, _ in self._pairs}

    def pairs(self) -> Iterator[tuple[str, nn.Module, QuantizedLayer]]:
        """Name, float layer and quantized layer of each layer that this swap replaces."""
        for site, layer in self._pairs:
            yield site.name, site.module, layer

    def called(self) -> Iterator[tuple[str, nn.Module, QuantizedLayer]]:
        """As :meth:`pairs`, for those that the model calls: no bare matrices."""
        for site, layer in self._pairs:
            if site.kind.is_called:
                yield site.name, site.module, layer

    def called_places(self) -> Iterator[tuple[str, QuantizedLayer, tuple[nn.Module, ...]]]:
        """The name of each layer of :meth:`called`, the quantized layer, and where a hook sees all calls of both.

        That is the quantized layer, whose hooks are those of the float one too; and the float one, where hooks of its
        own compute its weight.
        """
        for name, module, layer in self.called():
            shared = layer._forward_pre_hooks is module._forward_pre_hooks
            yield name, layer, (layer,) if shared else (layer, module)

    def joint_projections(self) -> Iterator[tuple[str, nn.Module]]:
        """The names of attention's joint projections, each with the module that may multiply its rows one by one."""
        for site, _ in self._pairs:
            if site.attention and site.name.rpartition(".")[2] == "in_proj":
                yield site.name, site.attention.opened

    def put_in(self) -> None:
        """Quantized layers in the model, in the mode (train or eval) of those they stand for."""
        for site, layer in self._pairs:
            layer.train(site.training)
            site.put(layer)

    def take_out(self) -> None:
        """The float layers back, the same objects."""
        for site, _ in self._pairs:
            site.put(site.module)

    @contextmanager
    def taken_out(self) -> Iterator[None]:
        """Float inside the block, quantized again after it."""
        self.take_out()
        try:
            yield
        finally:
            self.put_in()

    def __enter__(self) -> Swap:
        try:
            self.put_in()
        except BaseException:
            self.take_out()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.take_out()


def _takes_all_methods(site: Site) -> bool:
    return set(site.methods) == set(METHODS)


def _switched(site: Site, decision: Decision, partner: str, change: tuple[str, str], by: DecidedBy) -> Decision:
    """The decision on a layer for which another method is found better, or for one that shares its weight."""
    method, reason = change
    if partner != site.name and not _takes_all_methods(site):
        if method != "float":
            return _following(site, decision, partner, change)
        by, reason = "tie", f"tied to {partner}.weight ({reason})"
    changed = replace(decision, method=method, reason=reason, asked=None, decided_by=by)
    if method == "float":
        changed = replace(changed, weight_sqnr_db=None, output_error=None, uncalibrated=None)
        return replace(changed, bytes=decision.float_bytes, kernel=None)
    return changed


def _following(site: Site, decision: Decision, partner: str, change: tuple[str, str]) -> Decision:
    """The decision on a layer that lacks the methods of the one that it shares a weight with: it follows its bits."""
    method, reason = change
    kept, why = method_of(site, method)
    if METHODS[kept].bits == METHODS[decision.method].bits:
        return decision  # it keeps the method that its kind has
    named = f" ({reason})" if decision.decided_by == "rule" else ""
    told = f"tied to {partner}.weight{named}"
    told, asked = (told, None) if why is None else (f"{told}; {why}", method)
    return replace(decision, method=kept, reason=told, asked=asked, decided_by="tie")
