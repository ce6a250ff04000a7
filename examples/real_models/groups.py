"""Four bits as others have them, simulated in float: a float scale for each group, by absmax or by the least error."""

import copy

import torch
from torch import Tensor, nn

from tinyq_lightning import quantize
from tinyq_lightning.plan import find_sites

GROUP = 32
CONTROLS = ("int4-absmax", "int4-float-scales")


def round_in_groups(model: nn.Module, control: str) -> float:
    """Round the weights, in place, of the layers that w4a32 quantizes, to codes of -8…7 with a float scale a group.

    Returns:
        The mean SQNR of the layers in dB.
    """
    plan = {decision.name: decision for decision in quantize(copy.deepcopy(model), "w4a32")}
    ratios = []
    for site in find_sites(model):
        if plan[site.name].method != "w4a32" or plan[site.name].tied_to:
            continue
        for name, weight in site.kind.float_weights(site.module).items():
            size = site.sizes[name]
            rows = size.to_rows(weight.detach())
            rounded = _rounded(rows, control)
            ratios.append(10 * (rows.square().sum() / (rows - rounded).square().sum()).log10())
            weight.data.copy_(size.from_rows(rounded.contiguous()))
    return torch.stack(ratios).mean().item()


def _rounded(rows: Tensor, control: str) -> Tensor:
    missing = -rows.shape[1] % GROUP
    groups = nn.functional.pad(rows, (0, missing)).view(-1, GROUP)
    largest = groups.abs().amax(1, keepdim=True).clamp_min(1e-30)
    parts = (1.0,) if control == "int4-absmax" else torch.linspace(0.5, 1.1, 61).tolist()
    least, best = torch.full_like(largest, torch.inf), torch.zeros_like(groups)
    for part in parts:
        scale = largest * part / 7
        tried = (groups / scale).round().clamp(-8, 7) * scale
        error = (groups - tried).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best.view(len(rows), -1)[:, : rows.shape[1]]
