"""A network in a graph by torch: compiled, and as an AOTInductor package, which runs without Python.

Each function takes the float32 network, which maps token ids to hidden states, with ids ``[batch, tokens]`` as an
example, and returns a callable that does the same.
"""

import atexit
import copy
import shutil
import tempfile
from functools import cache, partial
from pathlib import Path

import torch
import torch._inductor
from torch import Tensor, nn

from tinyq_lightning import export, quantize

METHODS = ("float32", "w8a32", "w8a16", "w8a8")


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
    return torch.compile(network)


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
    **{f"{method} AOTInductor": partial(packaged, method) for method in METHODS},
}
