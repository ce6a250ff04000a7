"""The one table of layer kinds: what a kind is found by, why one of them stays float, how it is made and restored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from tinyq_lightning.layers.attention import QuantizedMultiheadAttention, in_projections, linear_with
from tinyq_lightning.layers.behaviour import (
    computes_linear,
    computes_scaled_embedding,
    forward_takes_one_input,
    multiplies_matrices,
)
from tinyq_lightning.layers.embedding import QuantizedEmbedding, ScaledQuantizedEmbedding
from tinyq_lightning.layers.int8_weight import Int8Weight, float_weight
from tinyq_lightning.layers.kind import Candidate, Kind
from tinyq_lightning.layers.linear import LAYERS, QuantizedLinear
from tinyq_lightning.methods import KernelName

__all__ = [
    "KINDS",
    "has_inner_layers",
    "is_replaceable",
    "kind_of",
    "why_closed",
]


class LinearKind(Kind):
    """``nn.Linear``, and subclasses of it that do what it does."""

    name = "linear"
    quantized_class = QuantizedLinear

    def finds(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and not isinstance(module, Int8Weight)

    def candidates(self, module: nn.Module, closed: str | None) -> Iterator[Candidate]:
        why = closed or _why_more_than(module, nn.Linear) or _why_weight(module) or _why_holds_more(module)
        yield Candidate(self, module, (module, "weight"), why)

    def shape(self, layer: Any) -> tuple[int, int]:
        return layer.out_features, layer.in_features

    def make(self, layer: Any, codes: Int8Weight | None, method: str, kernel: KernelName) -> QuantizedLinear:
        quantized = LAYERS[method].from_linear(layer, codes)
        quantized.kernel = kernel
        return quantized

    def make_empty(self, layer: Any, method: str, kernel: KernelName) -> QuantizedLinear:
        weight = float_weight(layer)
        rows, columns = weight.shape
        quantized = LAYERS[method](columns, rows, layer.bias is not None, weight.dtype, weight.device)
        quantized.kernel = kernel
        return quantized


class LikeLinearKind(LinearKind):
    """A class that is no ``nn.Linear`` and computes what it does, such as Hugging Face's ``Conv1D``.

    Known by what its forward computes. Its weight may be ``[in, out]``.
    """

    def finds(self, module: nn.Module) -> bool:
        # A class of torch's own has a meaning of its own.
        return (
            type(module).__module__.partition(".")[0] != "torch"
            and not isinstance(module, nn.Linear | nn.Embedding | Int8Weight)
            and multiplies_matrices(module)
            and forward_takes_one_input(module)
            and (computes_linear(module) or computes_linear(module, transposed=True))
        )

    def candidates(self, module: nn.Module, closed: str | None) -> Iterator[Candidate]:
        weight, bias = cast(Tensor, module._parameters["weight"]), module._parameters.get("bias")
        turned = not computes_linear(module)
        held = nn.Parameter(weight.detach().t() if turned else weight.detach(), requires_grad=weight.requires_grad)
        layer = linear_with(held if turned else weight, bias).train(module.training)
        why = closed or _why_replaced(module) or _why_more_than_forward(module) or _why_weight(module)
        why = why or _why_holds_more(module)
        yield Candidate(self, layer, (module, "weight"), why)


class AttentionKind(LinearKind):
    """``nn.MultiheadAttention``, whose projections are bare matrices: each becomes a layer."""

    name = "attention"

    def finds(self, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention) and not is_opened(module)

    def candidates(self, module: nn.Module, closed: str | None) -> Iterator[Candidate]:
        attention = cast(nn.MultiheadAttention, module)
        closed = closed or why_closed(module)
        opened = None if closed else QuantizedMultiheadAttention(attention)
        parts = dict(in_projections(attention)) if opened is None else opened._modules
        for part, layer in parts.items():
            assert layer is not None
            parameter = (layer, "weight") if part == "out_proj" else (module, f"{part}_weight")
            why = closed or _why_more_than(layer, nn.Linear) or _why_weight(layer) or _why_holds_more(layer)
            yield Candidate(self, layer, parameter, why, part, opened)


class EmbeddingKind(Kind):
    """``nn.Embedding``, where a layer that multiplies shares its weight."""

    name = "embedding"
    multiplies = False
    only_tied = True
    is_layer = False
    quantized_class = QuantizedEmbedding

    def finds(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding) and not isinstance(module, Int8Weight)

    def candidates(self, module: nn.Module, closed: str | None) -> Iterator[Candidate]:
        renorms = "max_norm rewrites its rows" if cast(nn.Embedding, module).max_norm is not None else None
        why = closed or renorms or _why_more_than(module, nn.Embedding) or _why_weight(module)
        yield Candidate(self, module, (module, "weight"), why or _why_holds_more(module))

    def shape(self, layer: Any) -> tuple[int, int]:
        return layer.num_embeddings, layer.embedding_dim

    def make(self, layer: Any, codes: Int8Weight | None, method: str, kernel: KernelName) -> QuantizedEmbedding:
        made = self._made(layer, "meta")
        return (made.quantize(layer.weight) if codes is None else made.share(codes)).train(layer.training)

    def make_empty(self, layer: Any, method: str, kernel: KernelName) -> QuantizedEmbedding:
        return self._made(layer, layer.weight.device)

    def _made(self, layer: Any, device: Any) -> QuantizedEmbedding:
        (rows, columns), dtype = layer.weight.shape, layer.weight.dtype
        scale = None if _is_torchs(layer, nn.Embedding) else computes_scaled_embedding(layer)
        if scale is None or scale == 1:
            return QuantizedEmbedding(rows, columns, layer.padding_idx, dtype, device)
        return ScaledQuantizedEmbedding(rows, columns, layer.padding_idx, dtype, device, scale)


KINDS: tuple[Kind, ...] = (LinearKind(), AttentionKind(), EmbeddingKind(), LikeLinearKind())
"""Every kind; the first that finds a module takes it."""


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a float or a quantized layer; None for any other module."""
    if isinstance(module, Int8Weight):
        return next(kind for kind in KINDS if kind.is_quantized(module))
    return next((kind for kind in KINDS if kind.finds(module)), None)


def is_replaceable(module: object) -> bool:
    """Whether ``module`` would itself be replaced, which takes a parent that holds it."""
    if not isinstance(module, nn.Module) or isinstance(module, Int8Weight):
        return False
    kind = kind_of(module)
    return kind is not None and kind.is_layer


def has_inner_layers(module: nn.Module) -> bool:
    """Whether the layers inside are candidates of ``module`` itself, so that none is to be looked for below it."""
    return isinstance(module, nn.MultiheadAttention) and not is_opened(module) and why_closed(module) is None


def is_opened(module: nn.Module) -> bool:
    """Whether the parts of ``module`` are modules already, in the place of one that held them as matrices."""
    return isinstance(module, QuantizedMultiheadAttention)


def why_closed(module: nn.Module) -> str | None:
    """Why the layers in a module must be left as they are; None if they need not."""
    if not isinstance(module, nn.MultiheadAttention) or is_opened(module):
        return None
    if why := _why_own_way(module, nn.MultiheadAttention):
        return why
    if not isinstance(module.out_proj, nn.Linear) or isinstance(module.out_proj, Int8Weight):
        return f"its out_proj has the type {type(module.out_proj).__name__}"
    held = {*module._modules, *module._buffers, *module._parameters}
    if more := sorted(held - _HELD_BY_ATTENTION):
        return f"it holds {', '.join(more)} besides what nn.MultiheadAttention does"
    return None


_HELD_BY_ATTENTION = {f"{part}_proj_weight" for part in ("in", "q", "k", "v")}


_HELD_BY_ATTENTION |= {"in_proj_bias", "bias_k", "bias_v", "out_proj"}


# What a subclass may define and still be replaced: how it is made and shown, not what it does.
_HARMLESS = {"reset_parameters", "extra_repr", "_version"}


# The same of a class that is no nn.Linear: its product is tried, and lazy classes give themselves a shape.
_HARMLESS_IF_NO_LINEAR = {"forward", "initialize_parameters"}


_TELLING = {"__call__", "__getattr__", "__getattribute__", "__setattr__"}


# Hooks around the state dict. They are about the float layer's entries, so they do not go over to a quantized one.
_STATE_HOOKS = {
    "_state_dict_hooks": "a state_dict hook",
    "_state_dict_pre_hooks": "a state_dict pre-hook",
    "_load_state_dict_pre_hooks": "a hook of load_state_dict",
    "_load_state_dict_post_hooks": "a hook of load_state_dict",
}


def _is_torchs(module: nn.Module, base: Any) -> bool:
    """Whether the forward of ``module`` is that of torch's class."""
    kind: Any = parametrize.type_before_parametrizations(module)
    return kind.forward is base.forward


def _why_replaced(module: nn.Module) -> str | None:
    return "its forward was replaced" if "forward" in vars(module) else None


def _why_own_way(module: nn.Module, base: Any, forward: bool = False) -> str | None:
    """Why a module is more than its torch class, whose behaviour is known; None if it is not.

    Args:
        module: of a subclass.
        base: torch's class.
        forward: whether a forward of its own is known to compute the same.
    """
    kind: Any = parametrize.type_before_parametrizations(module)
    if not forward and kind.forward is not base.forward:
        return f"{kind.__name__} has a forward of its own"
    if why := _why_replaced(module):
        return why
    own = {name for each in kind.__mro__[: kind.__mro__.index(base)] for name in vars(each)}
    own = {name for name in own - _HARMLESS if not name.startswith("__") or name in _TELLING}
    own -= {"forward"} if forward else set()
    return f"{kind.__name__} adds {', '.join(sorted(own))} to nn.{base.__name__}" if own else None


def _why_more_than_forward(module: nn.Module) -> str | None:
    """Why a class that is no ``nn.Linear`` has more to it than its forward; None if it has not."""
    kind = type(module)
    own = {name for each in kind.__mro__[: kind.__mro__.index(nn.Module)] for name in vars(each)}
    own = {name for name in own - _HARMLESS - _HARMLESS_IF_NO_LINEAR if name in _TELLING or not name.startswith("__")}
    own = {name for name in own if not name.startswith("_") or hasattr(nn.Module, name)}
    if "_save_to_state_dict" in own:
        saved: dict[str, Any] = {}
        module._save_to_state_dict(saved, "", False)
        own -= {"_save_to_state_dict"} if saved.keys() <= {"weight", "bias"} else set()
    return f"{kind.__name__} adds {', '.join(sorted(own))} to what nn.Linear has" if own else None


def _why_more_than(module: nn.Module, base: Any) -> str | None:
    """As :func:`_why_own_way`; a forward of its own is tried, and taken for torch's if it computes the same."""
    if isinstance(module._parameters.get("weight"), UninitializedParameter):
        return None  # an error, unless it is left float
    why = _why_own_way(module, base)
    if why is None or _is_torchs(module, base) or parametrize.is_parametrized(module):
        return why
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2 or not weight.is_floating_point() or not forward_takes_one_input(module):
        return why
    same = computes_linear(module) if base is nn.Linear else computes_scaled_embedding(module) is not None
    return _why_own_way(module, base, forward=True) if same else why


def _why_weight(module: nn.Module) -> str | None:
    """Why a weight cannot be replaced by codes; None if it can."""
    weight = module._parameters.get("weight")
    if isinstance(weight, UninitializedParameter) or parametrize.is_parametrized(module, "weight"):
        return None
    if weight is None:
        hooks = module._forward_pre_hooks.values()
        named = [
            hook for hook in hooks if "weight" in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None))
        ]
        return "its weight is computed by " + (f"the hook {type(named[0]).__name__}" if named else "a hook")
    for name, tensor in (("weight", weight), ("bias", module._parameters.get("bias"))):
        if tensor is not None and type(tensor) is not nn.Parameter:
            if not isinstance(tensor, UninitializedParameter):
                return f"its {name} has the type {type(tensor).__name__}"
        elif tensor is not None and tensor.layout != torch.strided:
            return f"its {name} is {str(tensor.layout).removeprefix('torch.')}"
    if not weight.is_floating_point():
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    return None if weight.numel() else f"its weight is empty: {list(weight.shape)}"


def _why_holds_more(module: nn.Module) -> str | None:
    """Why what was attached to a layer keeps it float; None if nothing was that a quantized layer would not have."""
    held: dict[str, Any] = {**module._parameters, **module._modules}
    numbers = isinstance(module, nn.Embedding) and not _is_torchs(module, nn.Embedding)  # its factor: carried over
    held |= {} if numbers else module._buffers
    for name in list(held.get("parametrizations") or ()) if parametrize.is_parametrized(module) else ():
        held.pop(str(name), None)
        if str(name) in ("weight", "bias"):
            held.pop("parametrizations", None)
    if more := sorted(held.keys() - {"weight", "bias"}):
        return f"it holds {', '.join(more)} besides its weight"
    own = next((what for key, what in _STATE_HOOKS.items() if _of_others(module, vars(module).get(key))), None)
    return f"it has {own}" if own else None


def _of_others(module: nn.Module, hooks: Any) -> bool:
    """Whether there is a hook that is neither torch's own nor a method of the module itself."""
    for held in (hooks or {}).values():
        hook = getattr(held, "hook", held)  # torch wraps some of them
        torchs = str(getattr(hook, "__module__", "")).partition(".")[0] == "torch"
        if not torchs and getattr(hook, "__self__", None) is not module:
            return True
    return False
