"""AOTInductor packages: the model compiled to machine code of this processor, which runs without Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.utils import _pytree as pytree

from tinyq_lightning.errors import ExportError
from tinyq_lightning.handover.example import Example
from tinyq_lightning.handover.programs import arranged, exported_program, tensors_of
from tinyq_lightning.handover.request import Request
from tinyq_lightning.kernels import exporting_for_this_processor, has_int8_product

__all__ = [
    "open_aoti",
    "write_aoti",
]


def write_aoti(request: Request, path: str) -> Sequence[str]:
    """Compile an AOTInductor package.

    Raises:
        ExportError: there is no C++ compiler, or the path does not end in ``.pt2``.
    """
    import torch._inductor

    if not path.endswith(".pt2"):
        raise ExportError(f"{os.path.basename(path)}: torch loads an AOTInductor package only if its name ends in .pt2")
    _check_compiler()
    with exporting_for_this_processor():
        program = exported_program(request)
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    notes = ["the package is machine code for processors with the vector instructions of this one"]
    if has_int8_product():
        notes.append("its int8 products are exact on processors with VNNI, as this one; without, they saturate")
    return notes


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
