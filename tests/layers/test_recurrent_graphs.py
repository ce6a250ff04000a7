"""Recurrent layers in graphs and transforms: what torch's own layers do there, with int8 codes as inputs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from tinyq_lightning.layers.recurrent import RECURRENT

IN, HIDDEN = 6, 10
SEQUENCES, CELLS = (nn.RNN, nn.LSTM, nn.GRU), (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
EACH = pytest.mark.parametrize("kind", [*SEQUENCES, *CELLS], ids=lambda kind: kind.__name__)


class First(nn.Module):
    """A recurrent layer between two others; only its output is used."""

    def __init__(self, layer):
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(IN, IN), layer, nn.Linear(HIDDEN, 2)

    def forward(self, x):
        found = self.layer(self.before(x))
        return self.after(found[0] if isinstance(found, tuple) else found)


def model_of(kind, called=True):
    """A quantized layer inside of a model, a fitting input, and the output."""
    torch.manual_seed(0)
    settings = {"num_layers": 2, "bidirectional": False} if kind in SEQUENCES else {}
    model = First(RECURRENT[kind].from_float(kind(IN, HIDDEN, **settings))).eval()
    x = torch.randn(4, 3, IN) if kind in SEQUENCES else torch.randn(4, IN)
    with torch.no_grad():
        wanted = model(x)
    if not called:
        model.layer._copies = None
    return model, x, wanted


@EACH
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("called", [False, True])
def test_an_exported_program_holds_int8_codes(kind, strict, called):
    if strict and kind in SEQUENCES and not hasattr(torch.onnx, "ops"):
        pytest.skip("torch 2.7 traces no method of a class that derives from a recurrent layer")
    model, x, wanted = model_of(kind, called)
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), wanted, rtol=1e-6, atol=1e-6)
    held = {name: tensor.dtype for name, tensor in program.state_dict.items() if "layer.weight" in name}
    assert set(held.values()) == {torch.int8, torch.float32}
    assert not program.constants
    assert not [node for node in program.graph.nodes if "tinyq" in str(node.target)]


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")  # as for torch's own layers
def test_an_exported_program_runs_where_this_package_is_not_imported(tmp_path):
    model, x, wanted = model_of(nn.LSTM)
    torch.export.save(torch.export.export(model, (x,), strict=False), tmp_path / "q.pt2")
    torch.jit.trace(model, (x,)).save(tmp_path / "q.pt")
    torch.save({"x": x, "wanted": wanted}, tmp_path / "data.pt")
    code = """
import sys, torch
data = torch.load("data.pt")
for run in (torch.export.load("q.pt2").module(), torch.jit.load("q.pt")):
    torch.testing.assert_close(run(data["x"]), data["wanted"], rtol=1e-6, atol=1e-6)
assert "tinyq_lightning" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")  # as for torch's own layers
@EACH
def test_a_traced_module_has_int8_buffers(kind):
    model, x, wanted = model_of(kind)
    traced = torch.jit.trace(model, (x,))
    torch.testing.assert_close(traced(x), wanted, rtol=1e-6, atol=1e-6)
    assert {tensor.dtype for name, tensor in traced.named_buffers() if "int8" in name} == {torch.int8}


@EACH
def test_compiling_makes_the_graphs_that_it_makes_with_the_float_layer(kind):
    model, x, wanted = model_of(kind)
    floats = First(kind(IN, HIDDEN, **({"num_layers": 2} if kind in SEQUENCES else {}))).eval()
    graphs = []
    with torch.no_grad():
        for each in (floats, model):
            torch._dynamo.reset()
            told = torch._dynamo.explain(each)(x)
            graphs.append((told.graph_count, told.graph_break_count))
        assert graphs[0] == graphs[1]
        compiled = torch.compile(model, backend="eager", fullgraph=kind in CELLS)
        for _ in range(2):
            torch.testing.assert_close(compiled(x), wanted, rtol=1e-6, atol=1e-6)
        for codes in model.layer.sources()[::2]:
            codes.zero_()
        assert torch.equal(compiled(x), model(x))
        assert not torch.equal(compiled(x), wanted)


@EACH
def test_hooks_run_once_compiled_or_not(kind):
    model, x, _ = model_of(kind)
    calls = []
    model.layer.register_forward_pre_hook(lambda module, given: calls.append("before"))
    model.layer.register_forward_hook(lambda module, given, output: calls.append("after"))
    with torch.no_grad():
        model(x)
        assert calls == ["before", "after"]
        calls.clear()
        torch.compile(model, backend="eager")(x)
    assert calls == ["before", "after"]


@EACH
def test_it_is_a_leaf_of_torch_fx_as_torchs_own_layers_are(kind):
    model, x, _ = model_of(kind)
    model = nn.Sequential(model.before, model.layer)
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 2
    for one, other in zip(traced(x), model(x), strict=True):
        assert torch.equal(one[0], other[0])


TRANSFORMS = {
    "functional_call": lambda f, x: f(x),
    "grad": lambda f, x: torch.func.grad(lambda given: f(given).square().sum())(x),
    "vmap": lambda f, x: torch.vmap(f)(torch.stack([x, 2 * x])),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
}


@EACH
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:`torch.jit.script` is deprecated")
def test_transforms_do_what_they_do_with_the_float_layer(kind, transform):
    model, x, _ = model_of(kind)
    floats = kind(IN, HIDDEN, **({"num_layers": 2} if kind in SEQUENCES else {})).eval()
    with torch.no_grad():
        for name, parameter in floats.named_parameters():
            parameter.copy_(getattr(model.layer, name))
    layers = First(floats).eval(), model
    layers[0].before, layers[0].after = model.before, model.after
    found = []
    for each in layers:
        held = {**dict(each.named_parameters()), **dict(each.named_buffers())}
        try:
            found.append(TRANSFORMS[transform](lambda x, m=each, h=held: torch.func.functional_call(m, h, (x,)), x))
        except RuntimeError as error:
            found.append(str(error))
    if isinstance(found[0], str):
        assert found[0] == found[1]
    else:
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
