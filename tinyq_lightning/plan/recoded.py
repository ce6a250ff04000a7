"""Codes that were chosen with data, in the place of those that were chosen without."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    """What calibration found for a layer of one weight.

    Attributes:
        codes: the weight's, for the layer to share; None: those that it has stay.
        bias: in the place of the layer's; None: it stays.
        weight_sqnr_db: of ``codes``.
        output_error: see :class:`~tinyq_lightning.plan.plan.Decision`.
        uncalibrated: likewise.
    """

    codes: Int8Weight | None = None
    bias: Tensor | None = None
    weight_sqnr_db: float | None = None
    output_error: float | None = None
    uncalibrated: str | None = None

    def layer(self, site: Site, layer: QuantizedLayer, kernel: KernelName) -> QuantizedLayer:
        """The quantized layer of a site with these codes; ``layer``, which is left as it is, if nothing changes."""
        if self.codes is None and self.bias is None:
            return layer
        codes = layer.coded_weights() if self.codes is None else {"weight": self.codes}
        made = site.kind.make(site.module, codes, layer.method, kernel)
        carry_over(site, made)
        if self.bias is not None:
            former = made._parameters["bias"]
            with torch.inference_mode(False):
                made.bias = nn.Parameter(self.bias, requires_grad=former is not None and former.requires_grad)
        return made

    def decision(self, decision: Decision) -> Decision:
        """The decision on the layer, with what was found."""
        sqnr = decision.weight_sqnr_db if self.weight_sqnr_db is None else self.weight_sqnr_db
        return replace(decision, weight_sqnr_db=sqnr, output_error=self.output_error, uncalibrated=self.uncalibrated)
