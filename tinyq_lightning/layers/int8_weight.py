"""Int8 codes and their scales as part of a module: what quantized layers have in common."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.weak import WeakTensorKeyDictionary
from typing_extensions import Self

from tinyq_lightning.errors import ModelError, ReadOnlyWeightError
from tinyq_lightning.kernels import (
    CodeHolder,
    WeightForm,
    dequantize,
    in_transform,
    outside_modes,
    quantize_per_row,
    weight_form,
)
from tinyq_lightning.layers.dequantized import Dequantized, WeightSource
from tinyq_lightning.layers.quantized_layer import PLACEHOLDER, QuantizedLayer

__all__ = [
    "Int8Weight",
    "float_weight",
    "follow",
]

# The tensor that a buffer was moved to, by the buffer: layers that share it and are moved later take the same one.
_moved: MutableMapping[Tensor, weakref.ref[Tensor]] = WeakTensorKeyDictionary()


class Forms(dict[str, WeightForm]):
    """The forms that kernels have made of one layer's weights, by kernel.

    Attributes:
        dequantized: the float weight, while it is kept.
        keeps_codes: True once the layer was in a graph, which reads the plain codes: they stay beside the forms then.
    """

    keeps_codes = False

    def __init__(self) -> None:
        super().__init__()
        self.dequantized = Dequantized()

    def holder(self) -> CodeHolder | None:
        """The form that may be the only place of the codes."""
        return next((cast(CodeHolder, form) for form in self.values() if form.holds_codes), None)


# Held while forms are made or codes change their place, so that threads may make the first call at the same time.
_lock = threading.RLock()


# The layers whose codes are held by a form alone.
_packed: weakref.WeakSet[Int8Weight] = weakref.WeakSet()


class Int8Weight(QuantizedLayer):
    """A matrix held as int8 codes with one float32 scale per row; what quantized layers have in common.

    The buffers ``int8_weights`` ``[rows, columns]`` int8 and ``scales`` ``[rows]`` float32 keep their
    dtypes under ``.half()``, ``.to(torch.bfloat16)`` and every Lightning precision; :attr:`dtype`
    follows, and with it the dequantized :attr:`weight`. Layers that share them still do after ``.to``,
    ``deepcopy`` and pickling.

    Once a kernel has packed the weights they may be held in that form alone; ``int8_weights`` is then
    unpacked when it is read, by ``state_dict`` among others, and missing from ``buffers()`` meanwhile. A graph
    holds the plain codes, so tracing one unpacks all layers, which keep their plain codes from then on.

    A layer without another parameter has one of no elements, because people ask ``next(model.parameters())`` for
    a model's dtype and device.
    """

    scales: Tensor
    dtype: torch.dtype
    _transposed_groups = 0  # for dequantize
    _layout: torch.memory_format = torch.contiguous_format  # of the dequantized weight in memory

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str | None) -> None:
        nn.Module.__init__(self)  # not super(): the next class may be nn.Linear, which would make a float weight
        self.dtype = dtype
        self._forms = Forms()
        self._buffers["int8_weights"] = torch.zeros(rows, columns, dtype=torch.int8, device=device)
        self.register_buffer("scales", torch.ones(rows, dtype=torch.float32, device=device))
        self._keep_a_parameter()

    @property
    def device(self) -> torch.device:
        """Where its codes are."""
        codes = self._buffers["int8_weights"]
        return (self.scales if codes is None else codes).device

    @property
    def int8_weights(self) -> Tensor:
        """The codes ``[rows, columns]`` int8."""
        if torch.compiler.is_compiling():
            self._unpack_for_graph()
        codes = self._buffers["int8_weights"]
        if codes is None:
            with _lock:
                codes = self._buffers["int8_weights"]  # another thread may have unpacked them
                if codes is None:
                    codes = self._buffers["int8_weights"] = cast(CodeHolder, self._forms.holder()).codes()
        return codes

    @int8_weights.setter
    def int8_weights(self, codes: Tensor) -> None:
        with _lock:
            self._buffers["int8_weights"] = codes
            self._forms.clear()
            self._keep_a_parameter()

    def _codes_for_a_call(self) -> Tensor:
        """The codes, as :attr:`int8_weights`, but not kept beside a form that holds them."""
        with _lock:
            codes, holder = self._buffers["int8_weights"], self._forms.holder()
            return holder.codes() if codes is None and holder is not None else self.int8_weights

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _unpack_for_graph(self) -> bool:
        """Unpack every packed layer, while a graph is traced and before the tracer looks at the buffers.

        All at once, because a graph is guarded by whether a buffer is there: were equal blocks of a model unpacked one
        by one, each would need a graph of its own.
        """
        with outside_modes(), _lock:
            for layer in (self, *_packed):
                layer._forms.keeps_codes = True
                if layer._buffers["int8_weights"] is None:
                    layer.unpack()
            _packed.clear()
        return True

    def form(self, kernel: str) -> WeightForm | None:
        """The weights in the form that ``kernel`` takes: made on the first call, and again when they have changed.

        Returns:
            The form. If it holds the codes, they are not held anywhere else from then on, unless a graph reads them.
            None if ``int8_weights`` is temporarily replaced, as by :func:`torch.func.functional_call`.
        """
        codes, form = self._buffers["int8_weights"], self._forms.get(kernel)
        if form is None or not form.is_current(codes, self._buffers["scales"]):  # type: ignore[arg-type]
            with _lock:
                return self._make_form(kernel)
        if codes is not None and form.holds_codes and not self._forms.keeps_codes:
            with _lock:
                self._drop_codes()
        return form

    def _make_form(self, kernel: str) -> WeightForm | None:
        codes, form = self._buffers["int8_weights"], self._forms.get(kernel)
        if form is None or not form.is_current(codes, self.scales):
            holder = self._forms.holder()
            if holder is not None and codes is not None and not holder.handed_out(codes):
                return None
            form = self._new_form(kernel)
            if form.holds_codes or (holder is not None and not holder.is_current(self.int8_weights, self.scales)):
                self._forms.clear()
            self._forms[kernel] = form
        self._drop_codes()
        return form

    def _new_form(self, kernel: str) -> WeightForm:
        """The form that ``kernel`` takes, which layers that share the weights may have made already."""
        return weight_form(kernel, self.int8_weights, self.scales)

    def _drop_codes(self) -> None:
        """Let go of the plain codes if a form holds them."""
        if self._forms.holder() is not None and not self._forms.keeps_codes:
            self._buffers["int8_weights"] = None
            _packed.add(self)

    def quantize(self, weight: Tensor) -> Self:
        """Take ``weight``, of the shape of the codes and any floating dtype, as this layer's weight, quantized to int8.

        The codes are made on the weight's device. Returns the layer.

        Raises:
            ModelError: the shape is another, or the weight cannot be quantized.
        """
        if weight.shape != self.int8_weights.shape:
            wanted = list(self.int8_weights.shape)
            raise ModelError(f"{type(self).__name__} takes a weight of shape {wanted}, got {list(weight.shape)}")
        with torch.inference_mode(False), torch.no_grad():  # buffers that can be trained past later
            codes, self.scales = quantize_per_row(self._to_rows(weight))
            self.int8_weights = self._from_rows(codes)
        return self

    def _to_rows(self, weight: Tensor) -> Tensor:
        """The weight, or codes of it, as a matrix with a row for each scale."""
        return weight

    def _from_rows(self, codes: Tensor) -> Tensor:
        """The codes ``[rows, columns]`` in the shape of the weight."""
        return codes

    def coded_weights(self) -> Mapping[str, Int8Weight]:
        """This layer, which holds its weight itself."""
        return {"weight": self}

    def share(self, other: QuantizedLayer) -> Self:
        """Take the codes and scales of ``other``: the same memory, not a copy. Returns the layer."""
        (holder,) = other.coded_weights().values()
        self.int8_weights, self.scales = holder.int8_weights, holder.scales
        return self

    def dequantize(self) -> Tensor:
        """The weight as floats: ``[rows, columns]`` float32 (float64 where the layer's dtype is that)."""
        work = torch.float64 if self.dtype == torch.float64 else torch.float32
        return dequantize(self.int8_weights, self.scales, work, self._transposed_groups)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight in the layer's dtype. In-place methods are errors.

        Reading its shape, dtype and device costs nothing. Its values are computed when they are read, once within a
        forward pass: weights that were read last are kept, 32 MiB of them in the whole process.
        """
        if torch.compiler.is_compiling() or in_transform() or torch._C._len_torch_dispatch_stack():
            # a tracer would record the read-only type
            weight = dequantize(self.int8_weights, self.scales, self.dtype, self._transposed_groups)
            return weight.contiguous(memory_format=self._layout)
        with _lock:
            codes = self._buffers["int8_weights"]
            held = cast(CodeHolder, self._forms.holder()) if codes is None else codes
        source = WeightSource(held, self.scales, self.dtype, self._transposed_groups, self._layout)
        return self._forms.dequantized.weight(source, held.shape)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles hold the plain codes, and are packed when they are called.
        return {**vars(self), "_buffers": {**self._buffers, "int8_weights": self.int8_weights}, "_forms": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_forms": Forms()})  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with _lock:
            held, codes = self._buffers["int8_weights"], self.int8_weights
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination.pop(f"{prefix}{PLACEHOLDER}", None)
            destination[f"{prefix}int8_weights"] = codes  # not an alias: layers that share them give the same tensor
            self._buffers["int8_weights"] = held

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        self._parameters.pop(PLACEHOLDER, None)
        super()._load_from_state_dict(*args, **kwargs)
        self._keep_a_parameter()

    def unpack(self) -> None:
        """Hold plain codes, and no form made from them."""
        with _lock:
            holder = self._forms.holder()
            if self._buffers["int8_weights"] is None and holder is not None:
                self._buffers["int8_weights"] = holder.codes()
            self._forms.clear()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise ReadOnlyWeightError(
                f"the weight of {type(self).__name__} is a read-only view of its int8 codes: call .quantize(weight) to "
                "replace it, or assign before quantizing"
            )
        if name == "int8_weights":
            object.__setattr__(self, name, value)  # by the property: nn.Module would set the buffer and keep the forms
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Casts change the bias and the dequantized view. Codes and scales move, but keep dtype and bits:
        # a bfloat16 scale alone costs 0.2 % of accuracy, and lets 128 wrap round to -128.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scales.device)).dtype
        if fn(torch.empty(0, dtype=torch.int8, device=self.scales.device)).device != self.scales.device:
            self.unpack()
        kept = {name: self._buffers[name] for name in ("int8_weights", "scales")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after is not before:
                self._buffers[name] = follow(before, after)
        return self


def follow(before: Tensor, after: Tensor) -> Tensor:
    """Return ``after`` in the dtype of ``before``, or the tensor that another layer's ``before`` was moved to."""
    if after.dtype != before.dtype:
        after = before.to(after.device)
    if after is before:
        return after
    first = _moved[before]() if before in _moved else None
    if first is not None and first.device == after.device:
        return first
    _moved[before] = weakref.ref(after)
    return after


def float_weight(module: nn.Module, name: str = "weight") -> Tensor:
    """A weight that a float layer uses. A parametrized one is computed in eval mode, which changes no state."""
    if not parametrize.is_parametrized(module, name):
        return getattr(module, name)  # type: ignore[no-any-return]
    below = list(module.parametrizations.modules())  # type: ignore[union-attr]
    modes = [each.training for each in below]
    try:
        for each in below:
            each.training = False  # in training mode, spectral_norm would make a step of its power iteration
        with torch.no_grad():
            return getattr(module, name)  # type: ignore[no-any-return]
    finally:
        for each, mode in zip(below, modes, strict=True):
            each.training = mode
