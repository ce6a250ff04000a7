"""Layers of a plan of four bits as they are with eight, made when a search first asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tinyq_lightning.layers import QuantizedLayer
from tinyq_lightning.methods import METHODS, with_bits
from tinyq_lightning.plan.make_layers import QuantizedLayers
from tinyq_lightning.plan.plan import Decision, Plan
from tinyq_lightning.plan.sites import Site

__all__ = [
    "EightBits",
]


class EightBits:
    """The layers of a plan with codes of eight bits. Those that share a weight share its codes.

    Args:
        plan: with codes of four bits.
        sites: the layers that it quantizes.
    """

    def __init__(self, plan: Plan, sites: Sequence[Site]) -> None:
        self._sites = {site.name: site for site in sites}
        decisions = [
            replace(each, method=with_bits(each.method, 8)) if each.name in self._sites else each for each in plan
        ]
        self._decisions = {each.name: each for each in decisions}
        self._making = QuantizedLayers(replace(plan, decisions=tuple(decisions)))
        self._layers: dict[str, QuantizedLayer] = {}

    def layer(self, name: str) -> QuantizedLayer:
        """The layer of this name, as a method of its kind has it."""
        if name not in self._layers:
            first = self._decisions[name].tied_to
            if first is not None:
                self.layer(first)
            made = self._making.make(self._sites[name])
            assert made is not None
            self._layers[name] = made
        return self._layers[name]

    def bytes(self, decision: Decision) -> int:
        """What a layer takes with codes of eight bits."""
        sizes = () if decision.tied_to else self._sites[decision.name].sizes.values()
        bits = METHODS[decision.method].bits
        return decision.bytes + sum(size.bytes(8) - size.bytes(bits) for size in sizes)

    def sized(self, name: str, decision: Decision) -> Decision:
        """A decision for eight bits with the SQNR and the bytes of that, where it has those of four."""
        self.layer(name)
        sqnr = next(each.weight_sqnr_db for each in self._making.plan if each.name == name)
        four_bits = replace(decision, method=with_bits(decision.method, 4))
        return replace(decision, weight_sqnr_db=sqnr, bytes=self.bytes(four_bits))
