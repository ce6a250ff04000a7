"""Why a layer of a model stays float whatever a spec says."""

from __future__ import annotations

from torch import Tensor

from tinyq_lightning.plan.sites import Site

__all__ = [
    "why_not_replaced",
    "why_stays_float",
]


def why_not_replaced(site: Site, bits: int = 8) -> str | None:
    """Why a layer cannot be replaced whatever the spec says; None if it can. The bits of its codes do not matter."""
    if site.why_float or site.is_lazy or site.is_quantized:
        return site.why_float
    for name, size in site.sizes.items():
        shape = site.weights_like[name].shape
        if shape != size.shape:
            return f"its {name} is {list(shape)} where its sizes tell of {list(size.shape)}"
    bias, size = getattr(site.module, "bias", None), next(iter(site.sizes.values()))
    if len(site.sizes) == 1 and isinstance(bias, Tensor) and bias.shape != (size.rows,):
        return f"its bias is {list(bias.shape)} where its sizes tell of {[size.rows]}"
    return None


def why_stays_float(site: Site, bits: int = 8) -> str | None:
    """Why a layer stays float whatever the spec says: it cannot be replaced, or a file would not shrink by it.

    Args:
        site: the layer.
        bits: of the codes that it would have.
    """
    why = why_not_replaced(site)
    if why or site.is_lazy:
        return why
    sizes, itemsize = site.sizes.values(), site.dtype.itemsize
    after, before = sum(size.bytes(bits) for size in sizes), sum(size.count for size in sizes) * itemsize
    if after < before:
        return None
    if len(sizes) > 1:
        return f"int{bits} is no smaller: {after} bytes, {before} as float"
    rows, codes = (size := next(iter(sizes))).rows, size.bytes(bits) - size.bytes(8) + size.count
    codes //= rows
    return f"int{bits} is no smaller: {codes} + {after // rows - codes} bytes a row, {before // rows} as float"
