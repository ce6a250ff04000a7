"""A network in a graph by torch: compiled, and as an AOTInductor package, which runs without Python.

``bare products``: compiled with nothing but int8 products where linear layers are, of digits that are there already. It
tells what the processor allows a method if rounding, scales and biases cost nothing. Its outputs mean nothing.

Each function takes the float32 network, which maps token ids to hidden states, with ids ``[batch, tokens]`` as an
example, and returns a callable that does the same.
"""

import atexit
import copy
import shutil
import tempfile
from functools import cache, partial
from pathlib import Path
from types import FunctionType

import contenders
import torch
import torch._inductor
from torch import Tensor, nn

from tinyq_lightning import export, quantize
from tinyq_lightning.methods import METHODS as HELD

METHODS = ("float32", *contenders.METHODS)


@cache
def folder() -> Path:
    """A folder that goes with the process."""
    made = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def any_size(ids: Tensor) -> tuple[dict[int, torch.export.Dim]]:
    """Dynamic shapes for batch and tokens."""
    return ({place: torch.export.Dim(f"size{place}", min=1, max=most) for place, most in enumerate((128, 256))},)


def compiled(method: str, network: nn.Module, ids: Tensor):
    network = copy.deepcopy(network)
    if method != "float32":
        quantize(network, method)
    return compiled_apart(network)


def compiled_apart(network: nn.Module):
    """Compiled alone: networks that share a ``forward`` would try each other's graphs first, on each call."""
    forward = type(network).forward
    own = FunctionType(forward.__code__.replace(), forward.__globals__)
    network.__class__ = type("Apart", (type(network),), {"forward": own})
    return torch.compile(network)


class BareProduct(nn.Module):
    """In the place of a linear layer: its product with digits ``[digits * rows, in]`` int8 that are there already."""

    def __init__(self, linear: nn.Linear, digits: Tensor, count: int) -> None:
        super().__init__()
        self.digits, self.count = nn.Buffer(digits), count
        self.codes = nn.Buffer(torch.zeros(linear.weight.shape, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        sums = torch._int_mm(self.digits[: self.count * rows.shape[0]], self.codes.t())
        # reads the activations, without which no compiler would compute them
        return (sums[: rows.shape[0]] * rows.amax(1, True)).view(*x.shape[:-1], -1)


def bare_products(method: str, network: nn.Module, ids: Tensor):
    network, count = copy.deepcopy(network), HELD[method].digits
    linears = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    widths = {layer.in_features for layer in linears.values()}
    digits = {width: torch.zeros(count * ids.numel(), width, dtype=torch.int8) for width in widths}
    for name, layer in linears.items():
        network.set_submodule(name, BareProduct(layer, digits[layer.in_features], count))
    return compiled_apart(network)


def packaged(method: str, network: nn.Module, ids: Tensor):
    network, path, (sizes,) = copy.deepcopy(network), str(folder() / f"{method}.pt2"), any_size(ids)
    if method == "float32":
        program = torch.export.export(network, (ids,), dynamic_shapes=(sizes,))
        torch._inductor.aoti_compile_and_package(program, package_path=path)
    else:
        quantize(network, method)
        export(network, path, ids[:2], to="aoti", dynamic=sizes)  # the compiler tries products on as many rows
    return torch._inductor.aoti_load_package(path)


BUILDS = {
    **{f"{method} compiled": partial(compiled, method) for method in METHODS},
    **{f"{method} bare products": partial(bare_products, method) for method in contenders.METHODS},
    **{f"{method} AOTInductor": partial(packaged, method) for method in METHODS},
}
