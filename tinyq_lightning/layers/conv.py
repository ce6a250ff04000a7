"""Custom quantized layers that take the place of torch's convolutions, with weights of eight or four bits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, SupportsIndex, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from typing_extensions import Self, override

from tinyq_lightning.kernels import (
    CONV_FORMS,
    INPUT_DTYPES,
    LAYOUTS,
    Choice,
    ConvForm,
    ConvFormulaName,
    FloatConvWeights,
    Geometry,
    WeightForm,
    choose_convolution,
    convolve,
    convolve_once,
    in_jit_trace,
    in_transform,
    is_channels_last,
    is_exporting,
    layout_of,
    output_sizes,
    packed_convolution,
    quantized_convolution,
    weight_form,
)
from tinyq_lightning.layers.computed import float_weight
from tinyq_lightning.layers.conv_sizes import conv_shape, weight_size
from tinyq_lightning.layers.leaf import leaf_call
from tinyq_lightning.layers.multiplying import MultiplyingLayer
from tinyq_lightning.layers.own_forward import padding_of
from tinyq_lightning.layers.own_padding import OwnPadding
from tinyq_lightning.methods import METHODS, KernelName

__all__ = [
    "QuantizedConv",
]

_TAKEN_OVER = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "transposed",
    "output_padding",
    "groups",
    "padding_mode",
    "_reversed_padding_repeated_twice",
)

_MOVES = {
    "stride",
    "padding",
    "output_padding",
    "dilation",
    "groups",
    "padding_mode",
    "_reversed_padding_repeated_twice",
}


class QuantizedConv(MultiplyingLayer):
    """A convolution that holds its weight as int8 codes with one float32 scale per output channel.

    The base of the layers below, each a subclass of the layer of torch that it stands for, as
    :class:`~tinyq_lightning.layers.linear.QuantizedLinear` is of ``nn.Linear``. The buffers are ``int8_weights`` int8,
    in the shape of the float weight, and ``scales`` ``[out]`` float32; ``bias`` ``[out]`` is a parameter if there is
    one; with four bits also ``multipliers``, whose groups are of the flattened inputs of an output channel. Activations
    are used as they are (``w8a32``, ``w4a32``) or rounded with one step a sample. A transposed convolution takes them
    as they are.

    Args:
        conv: the float layer, whose sizes, moves and bias are taken over.
        method: how activations are held.
        dtype: floating dtype of the dequantized weight.
        device: where the codes lie.
    """

    torch_class: ClassVar[Any]
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    padding_mode: str
    own_padding: OwnPadding | None
    _reversed_padding_repeated_twice: Sequence[int]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A layer; torch's, if the class is called as torch's is: PEFT makes adapters by ``type(layer)(2, 4, 3)``."""
        if isinstance(args[0] if args else kwargs.get("in_channels"), SupportsIndex):  # NumPy's numbers too
            return cls.torch_class(*args, **kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        conv: Any,
        method: str = "w8a32",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(conv.out_channels, 0, dtype, device)
        vars(self).update({name: vars(conv)[name] for name in _TAKEN_OVER})
        self._buffers["int8_weights"] = torch.zeros(weight_size(self).shape, dtype=torch.int8, device=device)
        self._transposed_groups = self.groups if self.transposed else 0
        held = conv._parameters.get("weight")
        self._channels_last = is_channels_last(float_weight(conv) if held is None else held)
        self.own_padding = padding_of(conv)
        self._choices = {}
        self._moves = self._moves_without_size()
        self._first: Tensor | None = None  # without values
        self.method = method
        if METHODS[method].bits == 4:
            self._hold_four_bits()
        self.kernel: KernelName = "auto"
        self.register_parameter("bias", conv.bias)
        self._keep_a_parameter()

    @property
    def _layout(self) -> torch.memory_format:  # type: ignore[override]
        return LAYOUTS[len(self.kernel_size) + 2] if self._channels_last else torch.contiguous_format

    @override
    def _to_rows(self, weight: Tensor) -> Tensor:
        return weight_size(self).to_rows(weight)

    @override
    def _from_rows(self, codes: Tensor) -> Tensor:
        return weight_size(self).from_rows(codes)

    def with_method(self, method: str) -> QuantizedConv:
        """A layer that holds its activations by another method and shares this layer's tensors and hooks."""
        self._refuse_other_bits(method)
        if self.transposed and METHODS[method].rounds:
            raise NotImplementedError(f"{type(self).__name__} has no method {method}")
        layer = object.__new__(type(self))
        vars(layer).update(vars(self))
        vars(layer).update(method=method, _choices={})
        return layer

    @override
    def _choose(self, device: str) -> Choice:
        return choose_convolution(self.kernel, METHODS[self.method], conv_shape(self), device)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """``input`` ``[N, in, ...]`` or ``[in, ...]`` → ``[N, out, ...]`` or ``[out, ...]``, as the float layer.

        Args:
            input: of any floating dtype.
            output_size: as for the float layer; of transposed convolutions only.

        Raises:
            ValueError: the input has another shape.
        """
        if isinstance(input, Proxy):
            return leaf_call(self, input) if output_size is None else leaf_call(self, input, output_size)
        if not torch.compiler.is_compiling() and in_jit_trace():
            with warnings.catch_warnings():  # the tracer warns of each comparison of shapes
                warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined, unused-ignore]
                return self._checked(input, output_size)
        return self._checked(input, output_size)

    def _checked(self, input: Tensor, output_size: list[int] | None) -> Tensor:
        dims = len(self.kernel_size)
        channels = input.shape[-dims - 1] if dims < input.dim() < dims + 3 else -1
        if channels != self.in_channels:
            spatial = ", ".join("DHW"[-dims:] if dims > 1 else "L")
            raise ValueError(
                f"the input must have shape [N, {self.in_channels}, {spatial}] or [{self.in_channels}, {spatial}], "
                f"got {list(input.shape)}"
            )
        if not input.is_floating_point():
            raise TypeError(f"the input of a quantized convolution must have a floating dtype, not {input.dtype}")
        if input.dim() == dims + 1:
            sizes = None if output_size is None else [1, self.out_channels, *output_size[-dims:]]
            return self._forward(input.unsqueeze(0), sizes).squeeze(0)
        return self._forward(input, output_size)

    def _forward(self, x: Tensor, output_size: list[int] | None) -> Tensor:
        geometry, pads = self._moves_of(x, output_size)
        if self._channels_last:
            x = x.contiguous(memory_format=self._layout)
        if pads is not None:
            x = nn.functional.pad(x, pads, self._padding_mode())
        if torch.compiler.is_compiling():
            return self._in_graph(x, geometry)
        bias = self._parameters["bias"]
        method = METHODS[self.method]
        if type(x) is Tensor and x.dtype in INPUT_DTYPES and not in_transform() and x.shape[0]:
            form = self._form_on(x)
            scales: Tensor = self._buffers["scales"]  # type: ignore[assignment]
            if isinstance(form, FloatConvWeights):
                added = bias if bias is None or bias.dtype is torch.float32 else bias.float()
                return convolve(x, form.weight, added, geometry)
            if form is not None and output_size is None:
                return packed_convolution(method, form, x, scales, bias)
        kernel = self._formula_for(x)
        if not in_transform():  # integers of what is not dense would lie in another order
            x = x.contiguous(memory_format=layout_of(x))
        codes = self.int8_weights if in_transform() else self._codes_for_a_call()
        return quantized_convolution(method, kernel, x, codes, self.scales, bias, geometry)

    def _form_on(self, x: Tensor) -> ConvForm | None:
        """The weights as the kernel for ``x`` takes them; None if it takes the plain codes."""
        choice = self._choice_on(x.device.type)
        kernel = choice.kernel
        if choice.few_rows:
            sizes = output_sizes(tuple(x.shape[2:]), self.kernel_size, self._moves_of(None, None)[0])
            kernel = choice.few if x.shape[0] * math.prod(sizes) < choice.few_rows else kernel
        if kernel not in CONV_FORMS or (kernel == "float32" and x.dtype is not torch.float32):
            return None
        if kernel not in self._forms:
            self._first = torch.empty(x.shape, device="meta", memory_format=self._layout)
        return cast("ConvForm | None", self.form(kernel))

    def _new_form(self, kernel: str) -> WeightForm:
        geometry, _ = self._moves_of(None, None)
        make = partial(CONV_FORMS[kernel], geometry=geometry, first=cast(Tensor, self._first))
        if kernel == "int4":
            size, convolve = weight_size(self), partial(convolve_once, conv_shape(self))
            rows = {"to_rows": size.to_rows, "from_rows": size.from_rows}
            make = partial(make, multipliers=self.multipliers, **rows, convolve=convolve)
        return weight_form(f"{kernel} {geometry} {self._channels_last}", self.int8_weights, self.scales, make)

    def _in_graph(self, x: Tensor, geometry: Geometry) -> Tensor:
        """A formula of torch's operators on plain codes, which compilers can fuse and exported programs can hold."""
        method, codes, scales = METHODS[self.method], self.int8_weights, self.scales
        if self._is_transformed():
            formula = self._formula_name()
            return quantized_convolution(method, formula, x, codes, scales, self.bias, geometry, differentiable=True)
        integers = x.dtype in INPUT_DTYPES and not is_exporting() and self._takes_integers(x.device.type)
        kernel: ConvFormulaName = "integer" if integers else self._formula_name()
        return quantized_convolution(method, kernel, x, codes, scales, self.bias, geometry)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _takes_integers(self, device: str) -> bool:  # run once, while a graph is traced
        return self._choice_on(device).kernel == {"cpu": "int8", "cuda": "int8-cuda"}.get(device)

    def _moves_of(self, x: Tensor | None, output_size: list[int] | None) -> tuple[Geometry, list[int] | None]:
        """How the convolution moves over its input, and what is added to that before; None if nothing is."""
        moves = self._moves
        if self.own_padding is not None and x is not None:
            return moves[0], self.own_padding.ends_for(self, x.shape[2:])
        if output_size is None or x is None:
            return moves
        dims = len(self.kernel_size)
        output_padding = nn.modules.conv._ConvTransposeNd._output_padding(
            self,  # type: ignore[arg-type]
            x,
            output_size,
            list(self.stride),
            list(cast("tuple[int, ...]", self.padding)),
            list(self.kernel_size),
            dims,
            list(self.dilation),
        )
        return replace(moves[0], output_padding=tuple(output_padding)), moves[1]

    def _moves_without_size(self) -> tuple[Geometry, list[int] | None]:
        zeros = (0,) * len(self.kernel_size)
        if self.own_padding is not None:
            return self._geometry(zeros), None
        if self.transposed:
            return self._geometry(cast("tuple[int, ...]", self.padding)), None
        if self.padding_mode == "zeros" and not isinstance(self.padding, str):
            return self._geometry(self.padding), None
        ends = self._ends()
        if self.padding_mode == "zeros" and ends[::2] == ends[1::2]:
            return self._geometry(tuple(ends[-2::-2])), None
        return self._geometry(zeros), ends if any(ends) else None

    def _padding_mode(self) -> str:
        """The mode of ``torch.nn.functional.pad``."""
        if self.own_padding is not None:
            return self.own_padding.mode
        return "constant" if self.padding_mode == "zeros" else self.padding_mode

    def _ends(self) -> list[int]:
        """What is added at both ends of each dimension, the last first; torch counts zeros by the moves of the call."""
        if self.padding_mode != "zeros":
            return list(self._reversed_padding_repeated_twice)
        added = [
            0 if self.padding == "valid" else gap * (width - 1)
            for gap, width in zip(self.dilation, self.kernel_size, strict=True)
        ]
        return [end for total in reversed(added) for end in (total // 2, total - total // 2)]

    def _geometry(self, padding: tuple[int, ...]) -> Geometry:
        output_padding = self.output_padding if self.transposed else ()
        return Geometry(self.stride, padding, self.dilation, self.groups, self.transposed, output_padding)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if len(self.kernel_size) > 1:
            self._channels_last = self._is_last_after(fn)
        return super()._apply(fn, recurse)

    def _is_last_after(self, fn: Callable[[Tensor], Tensor]) -> bool:
        """Whether channels are to be last after ``fn``, which may be a change of the memory format."""
        tried = torch.empty([2] * (len(self.kernel_size) + 2), dtype=self.dtype, device=self.scales.device)
        if self._channels_last:
            tried = tried.contiguous(memory_format=LAYOUTS[tried.dim()])
        return is_channels_last(fn(tried))

    def extra_repr(self) -> str:
        """What ``print(model)`` shows in the brackets."""
        kernel = "" if self.kernel == "auto" else f", kernel={self.kernel}"
        shown = nn.modules.conv._ConvNd.extra_repr(self)  # type: ignore[arg-type, no-untyped-call]
        if self.own_padding is not None:
            shown += (
                ", padded by its input's size" if self.own_padding.ends is None else f", pads={self.own_padding.ends}"
            )
        return f"{shown}, method={self.method}, dtype={self.dtype}{kernel}"

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _MOVES:
            self.unpack()
            self._moves, self._choices = self._moves_without_size(), {}
