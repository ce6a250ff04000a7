"""A GPU for shapes, dtypes and devices alone: torch's fake tensors, on machines that have none.

Values do not exist; what is shown is that each operator has its tensors on the GPU, and which operators there are.
"""

import copy
import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinyq_lightning.kernels import int8, integer

GPU = torch.device("cuda", 0)


class Watched(TorchDispatchMode):
    """Counts the operators, and refuses those that a GPU would do otherwise, or would have the CPU wait for."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.counts[name] += 1
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        out = func(*args, **(kwargs or {}))
        made = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
        if any(each.is_cuda for each in given):
            assert all(each.is_cuda for each in made), f"{name} takes its result away from the GPU"
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"), f"{name} waits for the GPU"
        if name in ("div", "div_") and given[0].is_cuda:
            assert len(given) == 2, f"{name} by a number, which a GPU does by its reciprocal"
            assert given[1].is_cuda, f"{name} by a number on the CPU, which a GPU does by its reciprocal"
        if name == "_int_mm" and given[0].is_cuda:
            (rows, features), outputs = given[0].shape, given[1].shape[1]
            assert rows > 16, f"cuBLAS refuses {rows} rows"
            assert features * outputs, "cuBLAS refuses empty products"
            assert not features % 8, f"cuBLAS refuses {features} features"
            assert not outputs % 8, f"cuBLAS refuses {outputs} outputs"
            assert given[0].is_contiguous(), "cuBLAS is given digits by rows"
            assert given[1].t().is_contiguous(), "cuBLAS is given codes by rows"
        return out


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

# Torch asks for a guard before it indexes or differentiates on a device; a build without CUDA has none for GPUs.
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>) }
"""


@functools.cache
def _register_guard():
    if torch.version.cuda or torch.version.hip:
        return
    installed = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(_GUARD)
        places = [f"-I{installed / 'include'}", f"-L{installed / 'lib'}"]
        command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", *places, str(source), "-lc10", "-o", str(library)]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(library))


@contextmanager
def fake_gpu(monkeypatch, model, exact_product=True):
    """A block in which tensors may be made on a GPU; gives a copy of the model there."""
    _register_guard()
    model = copy.deepcopy(model)
    with FakeTensorMode() as mode, monkeypatch.context() as patch:
        for module in (int8, integer):
            patch.setattr(module, "has_cuda_product", lambda: exact_product)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else mode.from_tensor(buffer).to(GPU)
            for name, each in module._parameters.items():
                fake = None if each is None else mode.from_tensor(each).detach().to(GPU)
                module._parameters[name] = None if each is None else torch.nn.Parameter(fake, each.requires_grad)
        yield model
