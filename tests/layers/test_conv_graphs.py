"""Quantized convolutions in graphs: compiled, exported, traced."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from kernel_cases import each_method, normal, relative_error
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from tinyq_lightning import quantize


def network(method):
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 12, 1),
        nn.Conv2d(12, 12, 3, 2, 1, groups=12, padding_mode="reflect"),
        nn.ConvTranspose2d(12, 4, 2, 2),
    ).eval()
    quantize(model, method)
    return model, normal(3, 8, 10, 12)


def adding_to(graphs):
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend


@each_method
@pytest.mark.parametrize("first", ["packed", "fresh"])
def test_a_graph_is_plain_torch_on_the_codes_and_hooks_run_once(method, first):
    model, x = network(method)
    model[2].register_forward_hook(lambda module, inputs, output: output * 2)
    if first == "packed":
        model(x)
    graphs = []
    compiled = torch.compile(model, backend=adding_to(graphs), fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            assert relative_error(compiled(x), model(x).double()) < 1e-5
        model[4].int8_weights.zero_()
        assert torch.equal(compiled(x), model[4].bias.view(1, -1, 1, 1).expand(3, 4, 10, 12))
    assert len(graphs) == 1
    assert not [node for node in graphs[0].graph.nodes if "tinyq" in str(node.target)]


@each_method
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_of_one_place_lies_in_memory_as_the_float_one(method, stride):
    conv = nn.Conv2d(8, 12, 1, stride)
    model = nn.Sequential(conv)
    quantize(model, method)
    x = normal(3, 8, 10, 12)
    compiled = torch.compile(lambda x: model(x).view(len(x), -1), backend="eager", fullgraph=True)
    last = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert relative_error(compiled(x), model(x).flatten(1).double()) < 1e-5
        x = x.contiguous(memory_format=torch.channels_last)
        assert last(x).stride() == conv(x).stride()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_exported_convolution_of_one_place_is_exact_if_asked_for_int8():
    model = nn.Sequential(nn.Conv2d(8, 12, 1))
    quantize(model, {"method": "w8a16", "kernel": "int8"})
    program = torch.export.export(model, (normal(3, 8, 10, 12),), strict=False)
    graphs = [each.graph for each in program.graph_module.modules() if isinstance(each, torch.fx.GraphModule)]
    of_convolution = [node for graph in graphs for node in graph.nodes if "conv2d" in str(node.target)]
    assert [node.meta["val"].dtype for node in of_convolution] == [torch.float64]


@each_method
def test_equal_blocks_that_are_compiled_one_by_one_share_a_graph(method):
    blocks = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(10)))
    quantize(blocks, method)
    x, graphs = normal(2, 16, 8, 8), []
    backend = adding_to(graphs)
    with torch.no_grad():
        wanted = blocks(x)
        for block in blocks:
            block.compile(backend=backend, fullgraph=True)
        assert relative_error(blocks(x), wanted.double()) < 1e-4
    assert len(graphs) == 1


# torch's tracer warns of its own use of an autograd function
@each_method
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_network_gives_gradients(method):
    model, x = network(method)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(mine).sum().backward()
    model(theirs).sum().backward()
    assert relative_error(mine.grad, theirs.grad.double()) < 1e-5


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("method", ["w8a16", "w4a8"])
def test_one_graph_of_any_size_has_the_gradients_of_each_of_its_layers(method):
    model, x = network(method)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for samples in (3, 2):
        mine, alone = (x[:samples].clone().requires_grad_() for _ in range(2))
        compiled(mine).square().sum().backward()
        model(alone).square().sum().backward()
        assert relative_error(mine.grad, alone.grad.double()) < 1e-5


@pytest.mark.parametrize(
    "method", ["w8a8", *(pytest.param(each, marks=pytest.mark.slow) for each in ("w8a32", "w8a16"))]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_exported_network_holds_int8_codes_and_runs_without_this_package(method, tmp_path):
    model, x = network(method)
    with torch.no_grad():
        wanted = model(x)
        program = torch.export.export(model, (x,))
    held = [
        tensor.shape
        for tensor in (*program.state_dict.values(), *program.constants.values())
        if tensor.dtype == torch.int8
    ]
    assert sorted(held) == sorted(layer.int8_weights.shape for layer in model if hasattr(layer, "int8_weights"))
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save({"x": x, "wanted": wanted}, tmp_path / "case.pt")
    code = """
import sys, torch
case = torch.load("case.pt")
out = torch.export.load("program.pt2").module()(case["x"])
torch.testing.assert_close(out.detach(), case["wanted"], rtol=1e-4, atol=1e-4)
assert not any(name.startswith("tinyq") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)


@each_method
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_network_is_saved_and_gives_the_same_numbers(method, tmp_path):
    model, x = network(method)
    torch.jit.trace(model, (x,), check_tolerance=1e-3).save(tmp_path / "traced.pt")
    assert relative_error(torch.jit.load(tmp_path / "traced.pt")(x), model(x).double()) < 1e-5


@each_method
def test_symbolic_trace_takes_quantized_convolutions_for_leaves(method):
    model, x = network(method)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), model(x))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3", "4"]


@pytest.mark.slow
@each_method
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_inductor_graph_gives_the_same_numbers(method):
    model, x = network(method)
    with torch.no_grad():
        assert relative_error(torch.compile(model, fullgraph=True)(x), model(x).double()) < 1e-5


@each_method
@pytest.mark.parametrize("tracing_mode", ["real", "fake"])
def test_what_make_fx_records_has_the_gradients_of_the_network(method, tracing_mode):
    model, x = network(method)
    model.append(nn.Flatten()).append(nn.Linear(4 * 10 * 12, 3))
    quantize(model, method)
    trained = dict(model.requires_grad_(True).named_parameters())
    tensors = {**trained, **dict(model.named_buffers())}

    def call(tensors, x):
        return torch.func.functional_call(model, tensors, (x,))

    graph = make_fx(call, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(dict(tensors), x)
    wanted, got = call(dict(tensors), x), graph(dict(tensors), x)
    assert relative_error(got, wanted) < 0.02
    trained = [each for each in trained.values() if each.numel()]
    of_model = torch.autograd.grad(wanted.square().sum(), trained)
    of_graph = torch.autograd.grad(got.square().sum(), trained)
    for one, other in zip(of_graph, of_model, strict=True):
        assert relative_error(one, other) < 0.05
