"""Codes that were chosen with data, in the place of those that were chosen without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from tinyq_lightning.layers import Int8Weight, QuantizedLayer
from tinyq_lightning.methods import KernelName
from tinyq_lightning.plan.make_layers import carry_over
from tinyq_lightning.plan.plan import Decision
from tinyq_lightning.plan.sites import Site

__all__ = [
    "Recoded",
]


@dataclass(frozen=True)
class Recoded:
    """What calibration found for a layer.

    Attributes:
        codes: for the layer to share, by the name of a weight; those of others stay.
        biases: in the place of the layer's, by their names; others stay.
        weight_sqnr_db: of all weights together; None if all codes stay.
        output_error: see :class:`~tinyq_lightning.plan.plan.Decision`.
        uncalibrated: likewise.
    """

    codes: Mapping[str, Int8Weight] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    weight_sqnr_db: float | None = None
    output_error: float | None = None
    uncalibrated: str | None = None

    def layer(self, site: Site, layer: QuantizedLayer, kernel: KernelName) -> QuantizedLayer:
        """The quantized layer of a site with these codes; ``layer``, which is left as it is, if nothing changes."""
        if not self.codes and not self.biases:
            return layer
        made = site.kind.make(site.module, {**layer.coded_weights(), **self.codes}, layer.method, kernel)
        carry_over(site, made)
        for name, bias in self.biases.items():
            former = made._parameters[name]
            with torch.inference_mode(False):
                kept = nn.Parameter(bias, requires_grad=former is not None and former.requires_grad)
                setattr(made, name, kept)
        return made

    def decision(self, decision: Decision) -> Decision:
        """The decision on the layer, with what was found."""
        sqnr = decision.weight_sqnr_db if self.weight_sqnr_db is None else self.weight_sqnr_db
        return replace(decision, weight_sqnr_db=sqnr, output_error=self.output_error, uncalibrated=self.uncalibrated)
