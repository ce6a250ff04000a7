"""Int8 codes and their scales as part of a module: what quantized layers have in common."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from tinyq_lightning.errors import ModelError, ReadOnlyWeightError
from tinyq_lightning.kernels import (
    CodeHolder,
    NibbleWeights,
    WeightForm,
    dequantize,
    in_functional_call,
    in_transform,
    is_mapped,
    is_recorded,
    is_same_memory,
    outside_modes,
    packed_shapes,
    quantize_groups_expanded,
    quantize_per_row,
    weight_form,
)
from tinyq_lightning.layers.dequantized import WeightSource
from tinyq_lightning.layers.forms import Forms, OwnTensors
from tinyq_lightning.layers.four_bit_state import load_four_bits, packed_codes
from tinyq_lightning.layers.moved import follow
from tinyq_lightning.layers.quantized_layer import PLACEHOLDER, QuantizedLayer
from tinyq_lightning.layers.state_entries import NO_PACKED_CODES

__all__ = [
    "Int8Weight",
]

# Held while forms are made or codes change their place, so that threads may make the first call at the same time.
_lock = threading.RLock()


# The layers whose codes are held by a form alone, and those of which this was so at any time.
_packed: weakref.WeakSet[Int8Weight] = weakref.WeakSet()
_once_packed: weakref.WeakSet[Int8Weight] = weakref.WeakSet()


_OTHER_SCALES = (
    "this {} is called with scales that are not its own, and without the codes that they are of, which are not among "
    "the buffers of a layer that has packed them. Take them from a copy, whose codes are plain until it is called: "
    "model = copy.deepcopy(other), {{**dict(model.named_parameters()), **dict(model.named_buffers())}}"
)


class Int8Weight(QuantizedLayer):
    """A matrix held as int8 codes with one float32 scale per row; what quantized layers have in common.

    A weight of four bits is held as the int8 codes that it expands to, ``multiplier * code``, which kernels multiply
    by, and the buffer ``multipliers`` ``[rows, ceil(groups / 2)]`` uint8, by which they are packed again: the state
    dict has ``int4_weights`` ``[rows, ceil(columns / 2)]`` uint8 in their place.

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
    multipliers: Tensor
    dtype: torch.dtype
    _transposed_groups = 0  # for dequantize
    _layout: torch.memory_format = torch.contiguous_format  # of the dequantized weight in memory

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str | None) -> None:
        nn.Module.__init__(self)  # not super(): the next class may be nn.Linear, which would make a float weight
        self.dtype = dtype
        self._forms, self._own = Forms(), OwnTensors()
        self._buffers["int8_weights"] = torch.zeros(rows, columns, dtype=torch.int8, device=device)
        self.register_buffer("scales", torch.ones(rows, dtype=torch.float32, device=device))
        self._own.scales = self.scales
        self._keep_a_parameter()

    @property
    def device(self) -> torch.device:
        """Where its codes are."""
        codes = self._buffers["int8_weights"]
        return (self.scales if codes is None else codes).device

    @property
    def bits(self) -> int:
        """Of a weight's code: 8 or 4."""
        return 8 if self._buffers.get("multipliers") is None else 4

    @property
    def int4_weights(self) -> Tensor:
        """The codes of a weight of four bits, two a byte: ``[rows, ceil(columns / 2)]`` uint8, made when it is read.

        Raises:
            AttributeError: the weight has eight bits.
        """
        if self.bits != 4:
            raise AttributeError(f"{type(self).__name__} has codes of eight bits: int8_weights")
        holder = self._forms.holder()
        if isinstance(holder, NibbleWeights) and self._buffers["int8_weights"] is None:
            return holder.int4_weights
        return packed_codes(self._to_rows(self.int8_weights), self.multipliers)

    @property
    def int8_weights(self) -> Tensor:
        """The codes ``[rows, columns]`` int8."""
        if torch.compiler.is_compiling():
            self._refuse_other_scales_in_graph(self._unpack_for_graph())
        elif self._buffers["scales"] is not self._own.scales:
            self._refuse_other_scales()
        codes = self._buffers["int8_weights"]
        if codes is None:
            with _lock:
                codes = self._buffers["int8_weights"]  # another thread may have unpacked them
                if codes is None:
                    codes = cast(CodeHolder, self._forms.holder()).codes()
                    self._hold_codes(codes)
        return codes

    @int8_weights.setter
    def int8_weights(self, codes: Tensor) -> None:
        with _lock:
            self._hold_codes(codes)
            self._forms.clear()
            self._keep_a_parameter()

    def _hold_codes(self, codes: Tensor) -> None:
        self._buffers["int8_weights"] = codes
        self._own.take_codes(codes)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _refuse_other_scales(self) -> None:
        """Refuse to multiply the layer's own codes by the scales of other layers, as torch.func calls it with them.

        The buffers of a layer that has packed its codes are its scales alone. A compiler that leaves a call to eager
        code is not to trace this.
        """
        codes, scales = self._buffers["int8_weights"], cast(Tensor, self._buffers["scales"])
        if in_transform() and is_mapped(scales) and not (codes is not None and is_mapped(codes)):
            raise ModelError(
                f"vmap maps over the scales of this {type(self).__name__} but not over its codes, which are not among "
                "the buffers of a layer that has packed them: stack copies, whose codes are plain until they are "
                "called, as in torch.func.stack_module_state([copy.deepcopy(model) for model in models])"
            )
        own = self._own.scales
        if is_same_memory(scales, own):
            return
        plain = type(scales) is type(own) is Tensor and not in_transform() and scales.device == own.device
        if plain and torch.equal(scales, cast(Tensor, own)):  # a copy of its own
            return
        # of another layer that has packed its codes, or for one that has packed the codes that it shares with this one
        with _lock:
            others = [each._own.scales for each in _once_packed if each is not self]
        of_packed = any(other is own or is_same_memory(scales, other) for other in others)
        if codes is None or (of_packed and not self._own.are_lent(codes, self._forms.holder())):
            raise ModelError(_OTHER_SCALES.format(type(self).__name__))

    def _refuse_other_scales_in_graph(self, any_packed: bool) -> None:
        """The same while Dynamo traces a graph, which can tell tensors apart but not what is in them."""
        own, buffers = self._own, self._buffers
        if not any_packed or not torch.compiler.is_dynamo_compiling():  # torch.export calls layers with stand-ins
            return
        scales: Tensor = buffers["scales"]  # type: ignore[assignment]
        if scales is not own.scales and buffers["int8_weights"] is own.codes_in_graphs:  # or a copy of its own
            torch._assert_async(scales.eq(cast(Tensor, own.scales)).all(), _OTHER_SCALES.format(type(self).__name__))

    def _codes_for_a_call(self) -> Tensor:
        """The codes, as :attr:`int8_weights`, but not kept beside a form that holds them."""
        with _lock:
            codes, holder = self._buffers["int8_weights"], self._forms.holder()
            if codes is not None or holder is None:
                return self.int8_weights
            if self._buffers["scales"] is not self._own.scales:
                self._refuse_other_scales()
            return holder.codes()

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _unpack_for_graph(self) -> bool:
        """Unpack every packed layer, while a graph is traced and before the tracer looks at the buffers.

        All at once, because a graph is guarded by whether a buffer is there: were equal blocks of a model unpacked one
        by one, each would need a graph of its own.

        Returns:
            Whether any layer was packed at any time, so that there may be buffers without their codes.
        """
        with outside_modes(), _lock:
            for layer in (self, *_packed):
                if layer._buffers["int8_weights"] is None:
                    layer.unpack()
                layer._forms.keeps_codes = True
                layer._own.show_graphs()
            _packed.clear()
            return len(_once_packed) > 0

    def form(self, kernel: str) -> WeightForm | None:
        """The weights in the form that ``kernel`` takes: made on the first call, and again when they have changed.

        Returns:
            The form. If it holds the codes, they are not held anywhere else from then on, unless a graph reads them.
            None if ``int8_weights`` is temporarily replaced, as by :func:`torch.func.functional_call`.
        """
        codes, scales, form = self._buffers["int8_weights"], self._buffers["scales"], self._forms.get(kernel)
        if scales is not self._own.scales:
            self._refuse_other_scales()
        if form is None or not form.is_current(codes, scales):  # type: ignore[arg-type]
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
            if codes is not None and self._own.are_lent(codes, holder):
                return None
            form = self._new_form(kernel)
            if form.holds_codes or (holder is not None and not holder.is_current(self.int8_weights, self.scales)):
                self._forms.clear()
            self._forms[kernel] = form
        self._drop_codes()
        return form

    def _new_form(self, kernel: str) -> WeightForm:
        """The form that ``kernel`` takes, which layers that share the weights may have made already."""
        make = partial(NibbleWeights, multipliers=self.multipliers) if kernel == "int4" else None
        return weight_form(kernel, self.int8_weights, self.scales, make)

    def _drop_codes(self) -> None:
        """Let go of the plain codes if a form holds them, and torch.func does not put them back after this call."""
        if self._forms.holder() is not None and not self._forms.keeps_codes and not in_functional_call():
            self._buffers["int8_weights"] = None
            _packed.add(self)
            _once_packed.add(self)

    def quantize(self, weight: Tensor) -> Self:
        """Take ``weight``, of the shape of the codes and any floating dtype, as this layer's weight, quantized.

        The codes are made on the weight's device. Returns the layer.

        Raises:
            ModelError: the shape is another, or the weight cannot be quantized.
        """
        if weight.shape != self.int8_weights.shape:
            wanted = list(self.int8_weights.shape)
            raise ModelError(f"{type(self).__name__} takes a weight of shape {wanted}, got {list(weight.shape)}")
        with torch.inference_mode(False), torch.no_grad():  # buffers that can be trained past later
            if self.bits == 4:
                codes, multipliers, scales = quantize_groups_expanded(self._to_rows(weight))
                return self.take_codes(self._from_rows(codes), scales, multipliers)
            codes, scales = quantize_per_row(self._to_rows(weight))
            return self.take_codes(self._from_rows(codes), scales)

    def take_codes(self, codes: Tensor, scales: Tensor, multipliers: Tensor | None = None) -> Self:
        """Hold these tensors: the same memory, not a copy. Returns the layer.

        Args:
            codes: int8 in the shape of the weight; of a weight of four bits ``multiplier * code``.
            scales: ``[rows]`` float32.
            multipliers: ``[rows, ceil(groups / 2)]`` uint8, packed, of a weight of four bits; else None.
        """
        with _lock:
            self._buffers.pop("multipliers", None)
            if multipliers is not None:
                self._buffers["multipliers"] = multipliers
            self.scales = scales
            self.int8_weights = codes
        return self

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scales and multipliers, as :meth:`take_codes` has them."""
        return self.int8_weights, self.scales, self._buffers.get("multipliers")

    def _hold_four_bits(self) -> None:
        """Be a layer whose weight has four bits, with multipliers of 1."""
        codes = self._to_rows(self.int8_weights)
        shape = packed_shapes(len(codes), codes.shape[1])[1] if codes.shape[1] else (len(codes), 0)
        self._buffers["multipliers"] = torch.full(shape, 0x11, dtype=torch.uint8, device=codes.device)

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
        return self.take_codes(*holder.tensors())

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
        if is_recorded():
            # a tracer would record the read-only type
            weight = dequantize(self.int8_weights, self.scales, self.dtype, self._transposed_groups)
            return weight.contiguous(memory_format=self._layout)
        self._prepare_reading()
        with _lock:
            codes = self._buffers["int8_weights"]
            held = cast(CodeHolder, self._forms.holder()) if codes is None else codes
        source = WeightSource(held, self.scales, self.dtype, self._transposed_groups, self._layout)
        return self._forms.dequantized.weight(source, held.shape)

    def _prepare_reading(self) -> None:
        """Called before values of the weight are read outside of graphs."""

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles hold the plain codes, and are packed when they are called.
        return {
            **vars(self),
            "_buffers": {**self._buffers, "int8_weights": self.int8_weights},
            "_forms": {},
            "_own": {},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_forms": Forms(), "_own": OwnTensors()})  # type: ignore[no-untyped-call]
        self.recall_own_codes()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with _lock:
            held = self._buffers["int8_weights"]
            name = f"int{self.bits}_weights"
            codes = getattr(self, name)
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination.pop(f"{prefix}{PLACEHOLDER}", None)
            if self.bits == 4:
                destination.pop(f"{prefix}int8_weights", None)
            destination[f"{prefix}{name}"] = codes  # not an alias: layers that share them give the same tensor
            self._buffers["int8_weights"] = held

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        self._parameters.pop(PLACEHOLDER, None)
        load = super()._load_from_state_dict
        if self.bits == 4:
            load = partial(load_four_bits, load, self._to_rows(self.int8_weights).shape, self._from_rows)
        load(*args, **kwargs)
        self._keep_a_parameter()

    def unpack(self) -> None:
        """Hold plain codes, and no form made from them."""
        with _lock:
            holder = self._forms.holder()
            if self._buffers["int8_weights"] is None and holder is not None:
                self._hold_codes(holder.codes())
            self._forms.clear()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise ReadOnlyWeightError(
                f"the weight of {type(self).__name__} is a read-only view of its int8 codes: call .quantize(weight) to "
                "replace it, or assign before quantizing"
            )
        if name == "int4_weights":
            raise ModelError(NO_PACKED_CODES)
        if name == "int8_weights":
            object.__setattr__(self, name, value)  # by the property: nn.Module would set the buffer and keep the forms
            return
        super().__setattr__(name, value)
        if name == "scales":
            self._own.scales = self.scales

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Casts change the bias and the dequantized view. Codes and scales move, but keep dtype and bits:
        # a bfloat16 scale alone costs 0.2 % of accuracy, and lets 128 wrap round to -128.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scales.device)).dtype
        if fn(torch.empty(0, dtype=torch.int8, device=self.scales.device)).device != self.scales.device:
            self.unpack()
        kept = {name: self._buffers.get(name) for name in ("int8_weights", "scales", "multipliers")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self._buffers.get(name)
            if before is not None and after is not None and after is not before:
                self._buffers[name] = follow(before, after)
        self.recall_own_codes()
        return self

    def forget_own_codes(self) -> None:
        """Keep no reference to codes and scales, so that their tensors can be swapped."""
        self._own.take_codes(None)
        self._own.scales = None

    def recall_own_codes(self) -> None:
        """Take the codes in the buffer, if there are any, and the scales for the layer's own."""
        self._own.take_codes(self._buffers["int8_weights"])
        self._own.scales = self._buffers["scales"]
