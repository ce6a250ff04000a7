"""Several weights of one layer as int8 codes, under the names that the float layer has for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from tinyq_lightning.errors import ModelError, ReadOnlyWeightError
from tinyq_lightning.kernels import (
    dequantize,
    expand,
    is_recorded,
    packed_shapes,
    quantize_groups_expanded,
    quantize_per_row,
)
from tinyq_lightning.layers.dequantized import Dequantized, WeightSource
from tinyq_lightning.layers.float_copies import FloatCopies
from tinyq_lightning.layers.four_bit_state import expanded_codes, packed_codes
from tinyq_lightning.layers.int8_weight import Int8Weight
from tinyq_lightning.layers.moved import follow
from tinyq_lightning.layers.quantized_layer import PLACEHOLDER, QuantizedLayer
from tinyq_lightning.layers.state_entries import StateEntries, is_path_walked

__all__ = [
    "NamedCodes",
]

# Held while float copies are made, so that threads may make the first call at the same time.
_lock = threading.RLock()


class NamedCodes(QuantizedLayer):
    """A layer that holds several matrices as int8 codes, each with one float32 scale per row.

    A weight ``weight_ih_l0`` ``[rows, columns]`` is held in the buffers ``weight_ih_l0_int8_weights``
    ``[rows, columns]`` int8 and ``weight_ih_l0_scales`` ``[rows]`` float32, which keep their dtypes under ``.half()``,
    ``.to(torch.bfloat16)`` and every Lightning precision; :attr:`dtype` follows. In the state dict they are
    ``weight_ih_l0.int8_weights`` and ``weight_ih_l0.scales``. With four bits the codes are ``multiplier * code``, there
    is a buffer ``weight_ih_l0_multipliers`` ``[rows, ceil(groups / 2)]`` uint8, and the state dict has
    ``weight_ih_l0.int4_weights`` and ``weight_ih_l0.multipliers``. Buffers cannot have these names: a dot leads to a
    module, and reading ``weight_ih_l0`` gives a tensor, the dequantized weight, as from the float layer. Where
    :meth:`holds_packed` says so, the buffer ``weight_ih_l0_int4_weights`` ``[rows, ceil(columns / 2)]`` uint8 stands in
    the place of the expanded codes.

    A layer without another parameter has one of no elements, because people ask ``next(model.parameters())`` for a
    model's dtype and device.

    Args:
        shapes: rows and columns of each weight, by its name.
        dtype: floating dtype of the dequantized weights.
        device: where the layer lives.
        bits: of a code.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        dtype: torch.dtype,
        device: torch.device | str | None,
        bits: int = 8,
    ) -> None:
        nn.Module.__init__(self)  # not super(): the next class may be nn.LSTM, which would make float weights
        self.dtype = dtype
        self.weight_names = tuple(shapes)
        self._columns = {name: columns for name, (_, columns) in shapes.items()}
        self._copies: FloatCopies | None = None
        self._dequantized = {name: Dequantized() for name in shapes}
        for name, (rows, columns) in shapes.items():
            self._buffers[_codes(name)] = torch.zeros(rows, columns, dtype=torch.int8, device=device)
            self._buffers[_scales(name)] = torch.ones(rows, dtype=torch.float32, device=device)
            if bits == 4:
                groups = packed_shapes(rows, columns)[1]
                self._buffers[_multipliers(name)] = torch.full(groups, 0x11, dtype=torch.uint8, device=device)
        self._keep_a_parameter()

    def codes_of(self, name: str) -> tuple[Tensor, Tensor]:
        """Codes ``[rows, columns]`` int8 and scales ``[rows]`` float32 of a weight; packed ones are expanded."""
        codes, scales = self._buffers.get(_codes(name)), cast(Tensor, self._buffers[_scales(name)])
        if codes is None:
            packed, multipliers = cast(Tensor, self._buffers[_packed(name)]), cast(Tensor, self.multipliers_of(name))
            codes = expand(packed, multipliers, self._columns[name])
        return codes, scales

    def holds_packed(self) -> bool:
        """Whether codes of four bits are held two a byte, and expanded when they are needed."""
        return False

    def pack(self) -> Self:
        """Hold codes of four bits two a byte. Returns the layer."""
        for name in self.weight_names:
            codes, multipliers = self._buffers.pop(_codes(name), None), self.multipliers_of(name)
            if codes is not None and multipliers is not None:
                self._buffers[_packed(name)] = packed_codes(codes, multipliers)
        return self

    def unpack(self) -> Self:
        """Hold codes of one byte each. Returns the layer."""
        for name in self.weight_names:
            if _packed(name) in self._buffers:
                self._buffers[_codes(name)] = self.codes_of(name)[0]
                del self._buffers[_packed(name)]
        return self

    def _hold(self) -> None:
        """Hold the codes as :meth:`holds_packed` says."""
        if self.holds_packed():
            self.pack()
        else:
            self.unpack()

    def multipliers_of(self, name: str) -> Tensor | None:
        """Packed multipliers of a weight of four bits; None for eight bits."""
        return self._buffers.get(_multipliers(name))

    @property
    def bits(self) -> int:
        """Of a weight's code: 8 or 4."""
        return 8 if self.multipliers_of(self.weight_names[0]) is None else 4

    def sources(self) -> tuple[Tensor, ...]:
        """Codes and scales of each weight, in turn."""
        return tuple(tensor for name in self.weight_names for tensor in self.codes_of(name))

    @property
    def device(self) -> torch.device:
        """Where its codes are."""
        return cast(Tensor, self._buffers[_scales(self.weight_names[0])]).device

    def coded_weights(self) -> dict[str, Int8Weight]:
        """What has the codes and scales of each weight by its name: made for the caller, over the same memory."""
        made = {name: Int8Weight(0, 0, self.dtype, "meta") for name in self.weight_names}
        for name, each in made.items():
            each.take_codes(*self.codes_of(name), self.multipliers_of(name))
        return made

    def code_places(self) -> dict[str, tuple[nn.Module, str]]:
        """The module and the buffer that hold the codes of each weight, by its name."""
        names = {name: _packed(name) if _packed(name) in self._buffers else _codes(name) for name in self.weight_names}
        return {name: (self, buffer) for name, buffer in names.items()}

    def share(self, other: QuantizedLayer) -> Self:
        """Take the codes and scales of ``other``: the same memory, not a copy. Returns the layer."""
        held = zip(self.weight_names, other.coded_weights().values(), strict=True)
        return self.take_codes({name: codes.tensors() for name, codes in held})

    def quantize(self, weights: Mapping[str, Tensor]) -> Self:
        """Take these weights ``[rows, columns]``, any floating dtype, as the layer's own, quantized.

        The codes are made on the weights' device. Returns the layer; if one of the weights is refused, it is
        unchanged.

        Args:
            weights: by name, all of them or some.

        Raises:
            ModelError: there is no weight of such a name or shape, or one cannot be quantized.
        """
        made: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
        for name, weight in weights.items():
            if name not in self.weight_names:
                raise ModelError(f"{type(self).__name__} has no weight {name!r}: it has {', '.join(self.weight_names)}")
            wanted = self.codes_of(name)[0].shape
            if weight.shape != wanted:
                raise ModelError(
                    f"{name} of {type(self).__name__} takes a weight of shape {list(wanted)}, got {list(weight.shape)}"
                )
            with torch.inference_mode(False), torch.no_grad():  # buffers that can be trained past later
                if self.bits == 4:
                    codes, multipliers, scales = quantize_groups_expanded(weight)
                    made[name] = codes, scales, multipliers
                else:
                    made[name] = *quantize_per_row(weight), None
        return self.take_codes(made)

    def take_codes(self, made: Mapping[str, tuple[Tensor, Tensor, Tensor | None]]) -> Self:
        """Hold these codes, scales and multipliers by name: the same memory, not a copy. Returns the layer."""
        self.unpack()
        for name, (codes, scales, multipliers) in made.items():
            self._buffers[_codes(name)], self._buffers[_scales(name)] = codes, scales
            if multipliers is not None:
                self._buffers[_multipliers(name)] = multipliers
        self._copies = None
        self._hold()
        self._keep_a_parameter()
        return self

    def dequantize(self, name: str) -> Tensor:
        """A weight as floats: ``[rows, columns]`` float32 (float64 where the layer's dtype is that)."""
        return dequantize(*self.codes_of(name), torch.float64 if self.dtype == torch.float64 else torch.float32)

    def weight_of(self, name: str) -> Tensor:
        """A dequantized weight in the layer's dtype. In-place methods are errors.

        Reading its shape, dtype and device costs nothing. Its values are computed when they are read.
        """
        codes, scales = self.codes_of(name)
        if is_recorded():
            return dequantize(codes, scales, self.dtype)  # a tracer would record the read-only type
        return self._dequantized[name].weight(WeightSource(codes, scales, self.dtype), codes.shape)

    def keeps_copies(self) -> bool:
        """Whether the float weights that the layer has run on are held for its next call."""
        return True

    def expanded(self) -> FloatCopies:
        """The float weights.

        They have the layer's dtype. Inside autocast on the CPU those of a float32 layer are rounded to autocast's dtype
        already: autocast would do it at each step of a sequence, because it remembers trainable weights only.
        """
        buffers, dtype = self._buffers, self.dtype
        if dtype is torch.float32 and torch.is_autocast_enabled("cpu") and self.device.type == "cpu":
            dtype = torch.get_autocast_dtype("cpu")
        copies = self._copies
        if copies is None or not copies.is_current(buffers, dtype):
            with _lock:
                copies = self._copies
                if copies is None or not copies.is_current(buffers, dtype):
                    self._copies = None  # the old ones need not be held while the new ones are made
                    coded = {name: self.codes_of(name) for name in self.weight_names}
                    copies = FloatCopies(buffers, [*self._saved_names()], coded, dtype)
                    if self.keeps_copies():
                        self._copies = copies
        return copies

    def _entries_of(self, name: str) -> StateEntries:
        """The entries of a weight in the state dict; of four bits without the codes, which are packed there."""
        names = {"scales": _scales(name)}
        names |= {"int8_weights": _codes(name)} if self.bits == 8 else {"multipliers": _multipliers(name)}
        return StateEntries(self, names)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("weight_names", ()):
            return self._entries_of(name) if is_path_walked() else self.weight_of(name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("weight_names", ()):
            raise ReadOnlyWeightError(
                f"{name} of {type(self).__name__} is a read-only view of its int8 codes: call "
                f".quantize({{{name!r}: weight}}) to replace it, or assign before quantizing"
            )
        super().__setattr__(name, value)

    def _replicate_for_data_parallel(self) -> Self:
        # not super(): nn.LSTM would copy its list of weights
        replica: Self = nn.Module._replicate_for_data_parallel(self)  # type: ignore[no-untyped-call]
        replica._copies = None
        return replica

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_copies": None, "_dequantized": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)  # type: ignore[no-untyped-call]  # not super(), as in __init__
        self._dequantized = {name: Dequantized() for name in self.weight_names}

    def _saved_names(self) -> dict[str, str]:
        """The name in the state dict of each buffer that has codes, scales or multipliers."""
        saved = {buffer: f"{name}.int{self.bits}_weights" for name, (_, buffer) in self.code_places().items()}
        saved |= {_scales(name): f"{name}.scales" for name in self.weight_names}
        if self.bits == 4:
            saved |= {_multipliers(name): f"{name}.multipliers" for name in self.weight_names}
        return saved

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}{PLACEHOLDER}", None)
        for buffer, saved in self._saved_names().items():
            destination[prefix + saved] = destination.pop(prefix + buffer)
        for name in self.weight_names if self.bits == 4 and _codes(self.weight_names[0]) in self._buffers else ():
            key, multipliers = f"{prefix}{name}.int4_weights", cast(Tensor, self.multipliers_of(name))
            destination[key] = packed_codes(self.codes_of(name)[0], multipliers)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self.unpack()
        saved = {prefix + name: prefix + buffer for buffer, name in self._saved_names().items()}
        missing, errors, told = list[str](), list[str](), set[str]()
        renamed = {saved.get(name, name): value for name, value in state_dict.items()}
        for name in self.weight_names if self.bits == 4 else ():
            codes, wrong = expanded_codes(state_dict, f"{prefix}{name}.", self.codes_of(name)[0].shape)
            if codes is not None:
                renamed[prefix + _codes(name)] = codes
            elif wrong:
                for key in (prefix + _codes(name), prefix + _multipliers(name)):  # which hold together
                    del renamed[key]
                    told.add(key)
                errors.append(wrong)
        self._parameters.pop(PLACEHOLDER, None)
        super()._load_from_state_dict(renamed, prefix, local_metadata, strict, missing, unexpected_keys, errors)
        self._hold()
        self._keep_a_parameter()
        for name, buffer in saved.items():
            errors = [each.replace(buffer, name) for each in errors]
        names = {buffer: name for name, buffer in saved.items()}
        missing_keys += [names.get(key, key) for key in missing if key not in told]
        error_msgs += errors

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Casts change the biases and the dequantized weights. Codes and scales move, but keep dtype and bits.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        self._copies = None
        kept = {buffer: cast(Tensor, self._buffers[buffer]) for buffer in self._saved_names()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for buffer, before in kept.items():
            after = cast(Tensor, self._buffers[buffer])
            if after is not before:
                self._buffers[buffer] = follow(before, after)
        return self


def _codes(name: str) -> str:
    return f"{name}_int8_weights"


def _packed(name: str) -> str:
    return f"{name}_int4_weights"


def _multipliers(name: str) -> str:
    return f"{name}_multipliers"


def _scales(name: str) -> str:
    return f"{name}_scales"
