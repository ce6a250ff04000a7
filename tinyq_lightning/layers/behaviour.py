"""What a layer of another class computes: its forward is tried on small tensors, never on the layer itself.

A subclass may write the same product in other words, as timm's ``Linear`` and transformers' ``FalconLinear`` do; a
class that is no subclass may as well, as torch_geometric's ``Linear`` and Hugging Face's ``Conv1D``. A name tells
nothing. Here the forward of the class runs on a stand-in with small random float64 parameters, and its results are
compared with those of torch's own function.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from itertools import product
from types import CodeType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = [
    "LEADS",
    "SIZES",
    "aside",
    "code_writes",
    "codes",
    "computes_linear",
    "computes_scaled_embedding",
    "forward_takes_one_input",
    "gradient",
    "multiplies_matrices",
    "near",
    "own_functions",
    "same",
    "writes",
]

SIZES = (1e-8, 1.0, 1e8)
"""Of values that are tried: a forward that clamps or rounds differs at one of them."""

LEADS = ((4,), (2, 3), (), (1000,))
"""The dimensions of inputs that are tried, but for the last."""

_ROWS, _COLUMNS = 5, 3
_AMBIGUOUS = 3  # attributes of a square weight that may tell either of its sizes
_CHANGING = {"append", "extend", "insert", "update", "pop", "remove", "clear", "setdefault", "discard", "popleft"}
_CHANGING |= {"print", "log", "log_dict", "info", "warn", "warning", "debug", "write", "next", "sleep"}
_CHANGING |= {"setattr", "delattr", "__setattr__", "__dict__"}
_WRITES = ("STORE_ATTR", "STORE_GLOBAL", "STORE_SUBSCR", "STORE_DEREF", "DELETE_ATTR", "DELETE_GLOBAL", "DELETE_SUBSCR")


class _ReadsMoreError(Exception):
    """The forward reads or writes what the function it is compared with knows nothing of."""


def computes_linear(module: nn.Module, transposed: bool = False) -> bool:
    """Whether the forward of ``module`` is ``x @ weight.T + bias`` and nothing else, in training and in evaluation.

    Args:
        module: with a matrix ``weight``, and a ``bias`` that is a vector or None.
        transposed: compare with ``x @ weight + bias``, as Hugging Face's ``Conv1D`` has it.
    """
    has_bias = module._parameters.get("bias") is not None
    shape = (_COLUMNS, _ROWS) if transposed else (_ROWS, _COLUMNS)
    kind: Any = type(module)
    dtype = cast(Tensor, module.weight).dtype
    with torch.inference_mode(False), torch.enable_grad():  # forwards are compared by their gradients too
        return any(
            _computes_linear(kind, kind.forward, has_bias, dtype, tuple(sizes.items()), transposed)
            for sizes in _small_sizes(module, shape)
        )


@lru_cache(maxsize=256)
def _computes_linear(
    kind: Any,
    forward: Callable[..., Any],
    has_bias: bool,
    dtype: torch.dtype,
    held: tuple[tuple[str, int], ...],
    transposed: bool,
) -> bool:
    """As :func:`computes_linear`, once for all layers that differ in their values only.

    Args:
        kind: the class.
        forward: what it has for a forward now, which may be exchanged.
        has_bias: whether there is a bias.
        dtype: of the weight.
        held: the attributes that tell the weight's sizes, with the sizes of the small one.
        transposed: whether the weight is ``[in, out]``.
    """
    shape, sizes = (_COLUMNS, _ROWS) if transposed else (_ROWS, _COLUMNS), dict(held)

    def expected(x: Tensor, weight: Tensor, added: Tensor | None) -> Tensor:
        return nn.functional.linear(x, weight.t() if transposed else weight, added)

    for training in (False, True):
        for size in SIZES:
            weight = _random(shape) * size
            added = _random((_ROWS,)) * size if has_bias else None
            tensors = {"weight": weight, "bias": added}
            for lead in LEADS:
                x = (_random((*lead, _COLUMNS)) * size).requires_grad_()
                got = _forward(kind, x, tensors, sizes, training)
                wanted = expected(x, weight, added)
                if got is None or not same(got, wanted) or not same(gradient(got, x), gradient(wanted, x)):
                    return False
        x = _random((2, _COLUMNS))
        x[0, 0] = torch.inf
        got = _forward(kind, x, tensors, sizes, training)
        if got is None or not same(got, expected(x, weight, added)):
            return False
    own = {"weight": _random(shape).to(dtype), "bias": _random((_ROWS,)).to(dtype) if has_bias else None}
    return _follows_autocast(kind, own, sizes) and _same_in_own_dtype(kind, own, sizes, expected)


def _follows_autocast(kind: Any, tensors: Mapping[str, Tensor | None], sizes: Mapping[str, int]) -> bool:
    """Whether autocast has an effect on the product; a forward may switch it off."""
    floats = {name: None if each is None else each.float() for name, each in tensors.items()}
    x = _random((4, _COLUMNS)).float()
    plain, cast_down = (_forward(kind, x, floats, sizes, False, autocast) for autocast in (False, True))
    return plain is not None and cast_down is not None and not torch.equal(plain.float(), cast_down.float())


def _same_in_own_dtype(
    kind: Any, tensors: Mapping[str, Tensor | None], sizes: Mapping[str, int], expected: Callable[..., Tensor]
) -> bool:
    """Whether the forward gives the product in the dtype of the layer too, up to rounding."""
    weight = cast(Tensor, tensors["weight"])
    x = _random((4, _COLUMNS)).to(weight.dtype)
    got, wanted = _forward(kind, x, tensors, sizes, False), expected(x, weight, tensors["bias"])
    return got is not None and near(got, wanted)


def computes_scaled_embedding(module: nn.Module) -> float | None:
    """The factor by which the forward of ``module`` multiplies the rows of ``weight``; None if it does more than that.

    The factor is a number of the class, or one that the module holds as an attribute or a buffer without dimensions.
    """
    own, kind = cast(Tensor, module.weight), type(module)
    shape = (_ROWS, own.shape[1])  # the factor is often the root of the number of columns
    held: dict[str, Any] = {name: value for name, value in vars(module).items() if isinstance(value, int | float)}
    held |= {name: value for name, value in module._buffers.items() if _is_number(value)}
    words = torch.tensor([[0, 3, 3], [4, 1, 2]])
    ones = _forward(kind, words, {"weight": torch.ones(shape, dtype=own.dtype)}, held, False)
    if ones is None or not ones.numel() or not bool((ones == ones.flatten()[0]).all()):
        return None
    factor = ones.flatten()[0].item()
    for training in (False, True):
        for size in SIZES:
            weight = _random(shape) * size
            got = _forward(kind, words, {"weight": weight}, held, training)
            again = _forward(kind, words, {"weight": weight.to(own.dtype)}, held, training)
            wanted = nn.functional.embedding(words, weight.to(own.dtype)) * factor
            if got is None or again is None or again.dtype != own.dtype or again.shape != wanted.shape:
                return None
            exact = _forward(kind, words, {"weight": torch.ones_like(weight)}, held, training)
            if exact is None or not same(got, nn.functional.embedding(words, weight) * exact.flatten()[0]):
                return None
            if not torch.allclose(again.double(), wanted.double(), rtol=4 * torch.finfo(own.dtype).eps, atol=0):
                return None
    return float(factor)


def forward_takes_one_input(module: nn.Module) -> bool:
    """Whether ``forward`` is a Python function of one input."""
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())
    except (TypeError, ValueError):
        return False
    return len(parameters) == 2 and all(each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters)


def multiplies_matrices(module: nn.Module) -> bool:
    """Whether a module has no children, and just a matrix ``weight`` and a ``bias`` that fits it or is None."""
    parameters = module._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if module._modules or module._buffers or parameters.keys() - {"weight", "bias"}:
        return False
    if not isinstance(weight, Tensor) or is_lazy(weight) or weight.dim() != 2 or not weight.is_floating_point():
        return False
    return bias is None or (not is_lazy(bias) and bias.dim() == 1 and bias.shape[0] in weight.shape)


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and not value.is_meta


def _small_sizes(module: nn.Module, shape: tuple[int, int]) -> Iterator[dict[str, int]]:
    """The attributes that tell the size of the weight, with the sizes of the small one.

    What an attribute of a square weight tells is not known: each possibility is one result, of the first attributes.
    """
    rows, columns = cast(Tensor, module.weight).shape
    held = [name for name, value in vars(module).items() if type(value) is int and value in (rows, columns)]
    told = [name for name in held if name != "padding_idx"]
    if rows == columns:
        for sizes in product(shape, repeat=min(len(told), _AMBIGUOUS)):
            yield dict(zip(told, sizes, strict=False))
    else:
        yield {name: shape[0] if vars(module)[name] == rows else shape[1] for name in told}


def _random(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def same(got: Any, wanted: Tensor) -> bool:
    """Whether these are the same numbers of the same dtype, up to the order in which float64 sums are taken."""
    return (
        type(got) is Tensor
        and got.dtype == wanted.dtype
        and got.shape == wanted.shape
        and torch.allclose(got, wanted, rtol=1e-9, atol=1e-9 * _largest(wanted), equal_nan=True)
    )


def near(got: Tensor, wanted: Tensor) -> bool:
    """Whether these are the same numbers of the same dtype, up to the rounding of sums in that dtype."""
    far = 16 * torch.finfo(wanted.dtype).eps * float(wanted.detach().abs().max())
    return got.dtype == wanted.dtype and torch.allclose(got, wanted, rtol=0, atol=far)


def _largest(tensor: Tensor) -> float:
    finite = tensor.detach().abs().nan_to_num(0.0, 0.0)
    return float(finite.max())


def gradient(output: Tensor, x: Tensor) -> Tensor:
    """Of the sum of squares of an output; NaN if it has none."""
    if not output.requires_grad:
        return torch.full_like(x, torch.nan)
    return torch.autograd.grad(output.square().sum(), x)[0]


def _forward(
    kind: Any,
    x: Tensor,
    tensors: Mapping[str, Tensor | None],
    known: Mapping[str, Any],
    training: bool,
    autocast: bool = False,
) -> Tensor | None:
    """What the forward of a class gives for a stand-in with these tensors; None if it fails or does more."""
    if any(writes(function) for function in own_functions(kind)):
        return None
    stand_in = _stand_in(kind, {**known, **tensors, "training": training})
    with aside(autocast):
        before = torch.get_rng_state()
        try:
            result = kind.forward(stand_in, x)
        except Exception:  # whatever a forward may raise: it is not the function it is compared with
            return None
        draws = not torch.equal(before, torch.get_rng_state())
    return result if isinstance(result, Tensor) and not draws else None


def own_functions(kind: type, names: Collection[str] = ("forward",)) -> Iterator[Callable[..., Any]]:
    """The forward of a class, or its functions of these names, and those of the classes it inherits up to torch's."""
    for each in kind.__mro__:
        if each.__module__.partition(".")[0] == "torch":
            return
        yield from (vars(each)[name] for name in names if name in vars(each))


@lru_cache(maxsize=1024)
def writes(function: Callable[..., Any]) -> bool:
    """Whether a function may change anything but its own names, so that to try it would leave a trace."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code is None or any(map(code_writes, codes(code)))


def code_writes(code: CodeType) -> bool:
    """The same of a code object, without those within it."""
    instructions = dis.get_instructions(code)
    return not _CHANGING.isdisjoint(code.co_names) or any(each.opname in _WRITES for each in instructions)


def codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function, and of the functions and comprehensions in it."""
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from codes(each)


def _stand_in(kind: Any, values: dict[str, Any]) -> Any:
    """An object of a subclass of ``kind`` whose only data are ``values``; a read of any other is an error."""
    constants: Collection[str] = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    defaults = {name: getattr(nn.Embedding, name, None) for name in constants}
    defaults |= {"norm_type": 2.0, "scale_grad_by_freq": False, "sparse": False}

    def read(self: Any, name: str) -> Any:
        if name in values:
            return values[name]
        if name in defaults:
            return defaults[name]
        if name == "__class__" or callable(getattr(kind, name, None)):
            return object.__getattribute__(self, name)
        raise _ReadsMoreError(name)

    def write(self: Any, name: str, value: Any) -> None:
        raise _ReadsMoreError(name)

    return object.__new__(type(kind.__name__, (kind,), {"__getattribute__": read, "__setattr__": write}))


@contextmanager
def aside(autocast: bool) -> Iterator[None]:
    """A block that leaves no trace in random state and modes: gradients on, on the CPU."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.device("cpu"),
    ):
        yield
