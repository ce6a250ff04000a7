"""How many bits the codes of each layer have, where a method asks for four."""

from __future__ import annotations

from collections.abc import Mapping

from tinyq_lightning.methods import METHODS, with_bits
from tinyq_lightning.plan.sites import Site
from tinyq_lightning.spec import Wanted

__all__ = [
    "method_of",
    "with_common_bits",
]


def method_of(site: Site, method: str) -> tuple[str, str | None]:
    """The method of a layer for which ``method`` is asked, and why it is another; None if it is the same.

    It is another if the kind lacks the method, and if codes of four bits with their multipliers would take as many
    bytes as codes of eight.
    """
    found, why = site.kind.method_for(site.module, method)
    if METHODS[found].bits == 8:
        return found, why
    sizes = site.sizes.values()
    if sum(size.bytes(4) for size in sizes) < sum(size.bytes(8) for size in sizes):
        return found, why
    return with_bits(found, 8), "four bits are no smaller than eight"


def with_common_bits(wanted: Mapping[str, Wanted], sites: Mapping[str, Site]) -> dict[str, Wanted]:
    """What is wanted of each layer, with codes of eight bits for those that share a weight with a layer of eight.

    Args:
        wanted: by the name of the layer.
        sites: the float layers by name.
    """
    common = dict(wanted)
    for name, site in sites.items():
        if site.is_quantized or not site.tied or _bits(site, wanted[name].method) != 4:
            continue
        other = next((each for each in site.tied if _bits(sites[each], wanted[each].method) == 8), None)
        if other is not None:
            method = with_bits(wanted[name].method, 8)
            common[name] = Wanted(method, f"tied to {other}.weight ({wanted[other].reason})", "tie")
    return common


def _bits(site: Site, method: str) -> int:
    """Of the codes that a layer would have; 0 for a float one."""
    return 0 if method == "float" or site.is_lazy else METHODS[method_of(site, method)[0]].bits
