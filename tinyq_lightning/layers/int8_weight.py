"""Int8 codes and their scales as part of a module: what quantized layers have in common."""

from __future__ import annotations

import weakref
from collections.abc import Callable, MutableMapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.weak import WeakTensorKeyDictionary
from typing_extensions import Self

from tinyq_lightning.errors import ModelError, ReadOnlyWeightError
from tinyq_lightning.kernels import (
    CodeHolder,
    Implementation,
    WeightForm,
    dequantize,
    quantize_per_row,
    weight_form,
)
from tinyq_lightning.layers.read_only import read_only

__all__ = [
    "Int8Weight",
    "float_weight",
]

# Where codes that several layers share were moved to by the first of them, so that the others follow it.
_moved: MutableMapping[Tensor, weakref.ref[Tensor]] = WeakTensorKeyDictionary()


class Int8Weight(nn.Module):
    """A matrix held as int8 codes with one float32 scale per row; what quantized layers have in common.

    The buffers ``int8_weights`` ``[rows, columns]`` int8 and ``scales`` ``[rows]`` float32 keep their
    dtypes under ``.half()``, ``.to(torch.bfloat16)`` and every Lightning precision; :attr:`dtype`
    follows, and with it the dequantized :attr:`weight`. Layers that share them still do after ``.to``,
    ``deepcopy`` and pickling.

    Once a kernel has packed the weights they may be held in that form alone; ``int8_weights`` is then
    made anew when it is read, by ``state_dict`` among others, and missing from ``buffers()`` meanwhile.
    """

    scales: Tensor
    dtype: torch.dtype

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str | None) -> None:
        super().__init__()
        self.dtype = dtype
        self._forms: dict[Implementation, WeightForm] = {}
        self._buffers["int8_weights"] = torch.zeros(rows, columns, dtype=torch.int8, device=device)
        self.register_buffer("scales", torch.ones(rows, dtype=torch.float32, device=device))

    @property
    def int8_weights(self) -> Tensor:
        """The codes ``[rows, columns]`` int8."""
        codes = self._buffers["int8_weights"]
        if codes is None:
            codes = self._buffers["int8_weights"] = cast(CodeHolder, self._holder()).codes()
        return codes

    @int8_weights.setter
    def int8_weights(self, codes: Tensor) -> None:
        self._buffers["int8_weights"] = codes
        self._forms.clear()

    def form(self, kernel: Implementation) -> WeightForm | None:
        """The weights in the form that ``kernel`` takes: made on the first call, and again when they have changed.

        A form that holds the codes is their only place from then on. None where codes that are not the layer's own
        stand in for them for a while, as in :func:`torch.func.functional_call`.
        """
        codes, form = self._buffers["int8_weights"], self._forms.get(kernel)
        if form is None or not form.is_of(codes, self._buffers["scales"]):  # type: ignore[arg-type]
            holder = self._holder()
            if holder is not None and codes is not None and not holder.gave(codes):
                return None
            form = weight_form(kernel, self.int8_weights, self.scales)
            if form.holds_codes or (holder is not None and not holder.is_of(self.int8_weights, self.scales)):
                self._forms.clear()
                holder = None
            self._forms[kernel] = form
            if holder is not None:
                self._buffers["int8_weights"] = None
        if form.holds_codes:
            self._buffers["int8_weights"] = None
        return form

    def _holder(self) -> CodeHolder | None:
        """The form that may be the only place of the codes."""
        return next((cast(CodeHolder, form) for form in self._forms.values() if form.holds_codes), None)

    def quantize(self, weight: Tensor) -> Self:
        """Take ``weight`` ``[rows, columns]``, any floating dtype, as this layer's weight, quantized to int8.

        The codes are made on the weight's device. Returns the layer.

        Raises:
            ModelError: the shape is another, or the weight cannot be quantized.
        """
        if weight.shape != self.int8_weights.shape:
            wanted = list(self.int8_weights.shape)
            raise ModelError(f"{type(self).__name__} takes a weight of shape {wanted}, got {list(weight.shape)}")
        with torch.inference_mode(False), torch.no_grad():  # buffers that can be trained past later
            self.int8_weights, self.scales = quantize_per_row(weight)
        return self

    def share(self, other: Int8Weight) -> Self:
        """Take the codes and scales of ``other``: the same memory, not a copy. Returns the layer."""
        self.int8_weights, self.scales = other.int8_weights, other.scales
        return self

    def dequantize(self) -> Tensor:
        """The weight as floats: ``[rows, columns]`` float32 (float64 where the layer's dtype is that)."""
        work = torch.float64 if self.dtype == torch.float64 else torch.float32
        return dequantize(self.int8_weights, self.scales, work)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight in the layer's dtype, made anew on each read; in-place methods are errors."""
        return read_only(dequantize(self.int8_weights, self.scales, self.dtype))

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles have the plain codes, and pack them for themselves.
        return {**vars(self), "_buffers": {**self._buffers, "int8_weights": self.int8_weights}, "_forms": {}}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        held, codes = self._buffers["int8_weights"], self.int8_weights
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}int8_weights"] = codes  # not an alias: layers that share them give the same tensor
        self._buffers["int8_weights"] = held

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def unpack(self) -> None:
        """Back to plain codes, and nothing made of them."""
        self._buffers["int8_weights"] = self.int8_weights
        self._forms.clear()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise ReadOnlyWeightError(
                f"the weight of {type(self).__name__} is a read-only view of its int8 codes: call .quantize(weight) to "
                "replace it, or assign before quantizing"
            )
        if name == "int8_weights":
            object.__setattr__(self, name, value)  # past nn.Module, which would set the buffer alone
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Casts are for the bias and the dequantized view. Codes and scales move, but keep dtype and bits:
        # a bfloat16 scale alone costs 0.2 % of accuracy, and lets 128 wrap round to -128.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scales.device)).dtype
        if fn(torch.empty(0, dtype=torch.int8, device=self.scales.device)).device != self.scales.device:
            self.unpack()
        kept = {name: self._buffers[name] for name in ("int8_weights", "scales")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after is not before:
                self._buffers[name] = _follow(before, after)
        return self


def _follow(before: Tensor, after: Tensor) -> Tensor:
    """``after``, of the dtype that ``before`` had; or what another layer has made of ``before`` there."""
    if after.dtype != before.dtype:
        after = before.to(after.device)
    if after is before:
        return after
    first = _moved[before]() if before in _moved else None
    if first is not None and first.device == after.device:
        return first
    _moved[before] = weakref.ref(after)
    return after


def float_weight(module: nn.Module) -> Tensor:
    """The weight that a float layer works with; a parametrized one as it is in eval mode, which leaves no trace."""
    if not parametrize.is_parametrized(module, "weight"):
        return module.weight  # type: ignore[return-value]
    below = list(module.parametrizations.modules())  # type: ignore[union-attr]
    modes = [each.training for each in below]
    try:
        for each in below:
            each.training = False  # spectral_norm goes on with its power iteration in training mode
        with torch.no_grad():
            return module.weight  # type: ignore[return-value]
    finally:
        for each, mode in zip(below, modes, strict=True):
            each.training = mode
