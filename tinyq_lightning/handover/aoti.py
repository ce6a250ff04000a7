"""AOTInductor packages: the model compiled to machine code of this processor, which runs without Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tinyq_lightning.errors import ExportError
from tinyq_lightning.handover.example import Example
from tinyq_lightning.handover.outputs import tensors_of
from tinyq_lightning.handover.programs import arranged, exported_program, refuse_classes
from tinyq_lightning.handover.request import Request
from tinyq_lightning.kernels import (
    compiles_packed_product,
    exporting_for_this_processor,
    has_int8_product,
    packing_in_graphs,
)
from tinyq_lightning.layers import QuantizedLayer

__all__ = [
    "open_aoti",
    "write_aoti",
]


def write_aoti(request: Request, path: str) -> Sequence[str]:
    """Compile an AOTInductor package.

    Raises:
        ExportError: there is no C++ compiler, the path does not end in ``.pt2``, or the model takes what only its
            class can make.
    """
    if not path.endswith(".pt2"):
        raise ExportError(f"{os.path.basename(path)}: torch loads an AOTInductor package only if its name ends in .pt2")
    _check_compiler()
    refuse_classes(request.example)
    if compiles_packed_product():
        _hold_plain_codes(request.module)
        with packing_in_graphs(), _casts_at_run_time():
            _compile(request, path, PACKED)
    else:
        _compile(request, path, {})
    notes = ["the package is machine code for processors with the vector instructions of this one"]
    if has_int8_product():
        notes.append("its int8 products are those of processors with VNNI, as this one; without, they saturate")
    return notes


# An activation function is read by the largest value of a row and by its rounding. With a threshold of 4, which is the
# compiler's own, it would be computed for each of them.
PACKED = {
    "freezing": True,
    "max_autotune_gemm": True,
    "max_autotune_gemm_backends": "CPP,ATEN",
    "autotune_num_choices_displayed": 0,
    "realize_reads_threshold": 3,
}
"""Options of the compiler that packs weights: constants are computed, and products tried, while it compiles."""


def _compile(request: Request, path: str, options: dict[str, Any]) -> None:
    from torch._inductor import aoti_compile_and_package

    with exporting_for_this_processor(), torch.no_grad():
        program = exported_program(request)
        aoti_compile_and_package(program, package_path=path, inductor_configs=options)


def _hold_plain_codes(module: nn.Module) -> None:
    """Have the codes of all layers as buffers: what is unpacked while a graph is traced, the compiler cannot pack."""
    for layer in module.modules():
        if isinstance(layer, QuantizedLayer):
            for weight in layer.coded_weights().values():
                weight.unpack()


@contextmanager
def _casts_at_run_time() -> Iterator[None]:
    """Return a context manager in which the compiler leaves int8 codes as they are where floats are made of them."""
    from torch._inductor.constant_folding import _dont_constant_fold, add_dont_constant_fold

    before = list(_dont_constant_fold)
    add_dont_constant_fold(torch.ops.prims.convert_element_type.default)
    try:
        yield
    finally:
        _dont_constant_fold[:] = before


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ExportError(
            "an AOTInductor package is compiled, and there is no C++ compiler: install one (on Debian and Ubuntu: "
            "apt install g++), or name it in the environment variable CXX"
        ) from error


def open_aoti(path: str, request: Request) -> Callable[[Example], Sequence[Tensor]]:
    """Load a package. It runs with the threads of torch."""
    import torch._inductor

    package = torch._inductor.aoti_load_package(path)
    structure = pytree.treespec_loads(package.loader.get_call_spec()[0])

    def run(example: Example) -> Sequence[Tensor]:
        args, kwargs = arranged(example, structure)
        return tensors_of(package(*args, **kwargs))

    return run
