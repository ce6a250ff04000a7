"""Each format of each net runs in a process that cannot import this package, or torch where the runtime needs none."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from exported_nets import NETS, needs_onnx

from tinyq_lightning import export, quantize
from tinyq_lightning.handover.example import example_for
from tinyq_lightning.handover.outputs import tensors_of

pytestmark = pytest.mark.slow

NAMES = ("mlp", "padded", "resnet", "unet", "states", "tied", "two")
REFUSING = """
import importlib.abc, json, sys

class Refusing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *rest):
        if name.split(".")[0] in REFUSED:
            raise ImportError(name)

sys.meta_path.insert(0, Refusing())
import numpy

def errors(run):
    for name in sys.argv[1:]:
        wanted = numpy.load(f"{name}-outputs.npz")
        for one, other in zip(run(name), (wanted[key] for key in wanted.files), strict=True):
            assert one.shape == other.shape
            gap = numpy.linalg.norm((one.astype(float) - other).ravel())
            yield name, gap / max(numpy.linalg.norm(other.astype(float).ravel()), 1e-9)

def tell(run):
    print(json.dumps(list(errors(run))))
"""
ONNX = """
import onnxruntime

def run(name):
    session = onnxruntime.InferenceSession(f"{name}.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, dict(numpy.load(f"{name}-inputs.npz")))

tell(run)
"""
OPENVINO = """
import openvino

def run(name):
    compiled = openvino.Core().compile_model(f"{name}.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled(dict(numpy.load(f"{name}-inputs.npz")))
    return [found[place] for place in range(len(compiled.outputs))]

tell(run)
"""
PT2 = """
import torch
from torch.utils._pytree import tree_leaves

@torch.no_grad()
def run(name):
    args, kwargs = torch.load(f"{name}-inputs.pt")
    outputs = torch.export.load(f"{name}.pt2").module()(*args, **kwargs)
    return [each.numpy() for each in tree_leaves(outputs) if torch.is_tensor(each)]

tell(run)
"""
FORMATS = {
    "onnx": (("tinyq_lightning", "lightning", "torch"), ONNX, 1e-4),
    "openvino": (("tinyq_lightning", "lightning", "torch", "onnx"), OPENVINO, 0.1),
    "pt2": (("tinyq_lightning", "lightning", "transformers"), PT2, 1e-3),
}


def write(folder, name, to):
    """Export a net, and write the inputs and outputs of one call beside it."""
    torch.manual_seed(0)
    net, inputs, dynamic = NETS[name]()
    if to == "pt2" and name == "states":  # torch exports recurrent layers for one length
        dynamic = {key: {place: dim for place, dim in dims.items() if dim == "batch"} for key, dims in dynamic.items()}
    quantize(net.eval(), "w8a8")
    export(net, folder / f"{name}{'.xml' if to == 'openvino' else '.' + to}", inputs, dynamic=dynamic)
    example = example_for(net, inputs, "forward")
    former = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            outputs = tensors_of(net(*example.args, **example.kwargs))
    finally:
        torch.backends.mha.set_fastpath_enabled(former)
    np.savez(folder / f"{name}-outputs.npz", *[each.numpy() for each in outputs])
    np.savez(folder / f"{name}-inputs.npz", **{key: each.numpy() for key, each in example.tensors().items()})
    torch.save((example.args, example.kwargs), folder / f"{name}-inputs.pt")


@pytest.mark.parametrize(
    "to", ["pt2", pytest.param("onnx", marks=needs_onnx), pytest.param("openvino", marks=needs_onnx)]
)
def test_every_net_runs_where_this_package_is_not(tmp_path, to):
    if to == "openvino":
        pytest.importorskip(to)
    refused, code, bound = FORMATS[to]
    for name in NAMES:
        write(tmp_path, name, to)
    command = [sys.executable, "-W", "ignore", "-c", f"REFUSED = {refused!r}\n{REFUSING}{code}", *NAMES]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name for name, _ in found} == set(NAMES)
    assert [each for each in found if not each[1] < bound] == []
