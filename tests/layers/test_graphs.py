"""Quantized layers in graphs: compiled, exported, traced."""

import re
import shutil
import subprocess
import sys

import pytest
import torch
from kernel_cases import LARGE, each_method, normal, random_layer, relative_error, with_products
from torch import nn
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from tinyq_lightning import quantize, quantized
from tinyq_lightning.kernels import (
    compiles_packed_product,
    exporting_for_this_processor,
    packing_in_graphs,
    takes_integers,
)


def adding_to(graphs):
    """A backend that adds each graph that is made to a list."""

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    return backend


def compiled_into(graphs, module):
    return torch.compile(module, backend=adding_to(graphs), fullgraph=True)


@each_method
@pytest.mark.parametrize("first", ["packed", "fresh"])
def test_a_compiled_graph_is_plain_torch_on_the_buffers_of_the_layer(kernel, method, first):
    layer = random_layer(method, *LARGE)
    x = normal(3, LARGE[1])
    if first == "packed":
        layer(x)
    graphs = []
    model = nn.Sequential(layer, nn.ReLU())
    compiled = compiled_into(graphs, model)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=2e-3)
        layer.int8_weights.zero_()
        assert torch.equal(compiled(x), layer.bias.relu().expand(3, -1))
    assert len(graphs) == 1  # calls outside of the graph in between do not make it anew
    assert not [node for node in graphs[0].graph.nodes if "tinyq" in str(node.target)]


@each_method
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_run_once_in_a_compiled_graph(kernel, method, when):
    layer = random_layer(method, *LARGE)
    if when == "before":
        layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    else:
        layer.register_forward_hook(lambda module, inputs, output: output * 2)
    x = normal(3, LARGE[1])
    with torch.no_grad():
        compiled = compiled_into([], layer)(x)
        torch.testing.assert_close(compiled, layer(x), rtol=1e-3, atol=4e-3)


@each_method
@pytest.mark.parametrize("first", ["packed", "fresh"])
def test_equal_blocks_that_are_compiled_one_by_one_share_a_graph(kernel, method, first):
    blocks = nn.Sequential(*(random_layer(method, 300, 300, seed=seed) for seed in range(12)))
    x = normal(4, 300)
    if first == "packed":
        blocks(x)
    graphs = []
    backend = adding_to(graphs)
    with torch.no_grad():
        for block in blocks:
            block.compile(backend=backend, fullgraph=True)
        blocks(x)
        assert len(graphs) == 1
        wanted = x
        for block in blocks:
            wanted = block.forward(wanted)
        assert relative_error(blocks(x), wanted.double()) < 0.02


@each_method
def test_a_called_layer_whose_bias_is_trained_compiles_too(kernel, method):
    layer = random_layer(method, *LARGE)
    layer.bias.requires_grad_()
    x = normal(4, LARGE[1])
    wanted = layer(x)
    compiled = torch.compile(nn.Sequential(layer), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        out = compiled(x)
        torch.testing.assert_close(out, wanted, rtol=1e-3, atol=2e-3)
    out.sum().backward()
    assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, 4))


# torch's tracer warns of its own use of an autograd function
@each_method
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_layer_sees_new_weights_and_gives_gradients(kernel, method):
    layer = random_layer(method, *LARGE)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, up = normal(3, LARGE[1]).requires_grad_(), normal(3, LARGE[0])
    compiled(x).backward(up)
    torch.testing.assert_close(x.grad, up @ layer.dequantize())
    layer.load_state_dict(random_layer(method, *LARGE, seed=9).state_dict())
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-3, atol=2e-3)


@each_method
@pytest.mark.parametrize("first", ["packed", "fresh"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_exported_layer_is_the_formula_with_int8_codes(kernel, method, first):
    layer = random_layer(method, *LARGE)
    x = normal(3, LARGE[1])
    if first == "packed":
        layer(x)
    program = torch.export.export(nn.Sequential(layer), (x,), strict=False)
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-2, atol=1e-2)
    held = [*program.state_dict.values(), *program.constants.values()]
    assert [tensor.shape for tensor in held if tensor.dtype == torch.int8] == [torch.Size(LARGE)]
    assert not [node for node in program.graph.nodes if "tinyq" in str(node.target)]


@each_method
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("grad", [True, False])
def test_an_exported_program_runs_where_this_package_is_not_imported(method, grad, tmp_path):
    layer = random_layer(method, *LARGE)
    x = normal(3, LARGE[1])
    layer(x)
    with torch.set_grad_enabled(grad):
        torch.export.save(torch.export.export(nn.Sequential(layer), (x,), strict=False), tmp_path / "program.pt2")
        torch.save({"x": x, "wanted": layer(x).detach()}, tmp_path / "case.pt")
    code = """
import sys, torch
case = torch.load("case.pt")
out = torch.export.load("program.pt2").module()(case["x"])
torch.testing.assert_close(out.detach(), case["wanted"], rtol=1e-2, atol=1e-2)
assert not any(name.startswith("tinyq") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)


@each_method
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("first", ["packed", "fresh"])
def test_a_traced_layer_is_saved_and_gives_the_layers_numbers_and_gradients(kernel, method, first, tmp_path):
    layer = random_layer(method, *LARGE)
    x = normal(3, LARGE[1]).requires_grad_()
    if first == "packed":
        layer(x)
    torch.jit.trace(nn.Sequential(layer), (x.detach(),), check_tolerance=1e-3).save(tmp_path / "traced.pt")
    traced = torch.jit.load(tmp_path / "traced.pt")
    assert relative_error(traced(x), layer(x).double()) < 1e-4
    up = normal(3, LARGE[0])
    grad = torch.autograd.grad(traced(x), x, up)[0]
    assert relative_error(grad, up.double() @ layer.dequantize().double()) < 1e-5


class Around(nn.Module):
    """Quantized layers of every kind, in code that torch.fx can trace."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.linear = nn.Linear(16, 16)
        self.head = nn.Linear(16, 50)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.head(self.linear(mixed + x).relu())


@each_method
def test_symbolic_trace_takes_quantized_layers_for_leaves(method):
    model = Around().eval()
    quantize(model, method)
    traced = torch.fx.symbolic_trace(model)
    tokens = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    assert torch.equal(traced(tokens), model(tokens))
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["embedding", "attention", "linear", "head"]


def test_a_child_that_was_compiled_before_quantizing_runs_the_quantized_layer():
    model = nn.Sequential(torch.compile(nn.Linear(16, 16), backend="eager"), nn.ReLU())
    x = normal(4, 16)
    before = model(x)
    with quantized(model, "w8a8"):
        during = model(x)
    assert not torch.equal(during, before)
    assert torch.equal(model(x), before)


@each_method
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_second_derivatives_of_a_compiled_layer_are_right_or_refused(kernel, method):
    layer = random_layer(method, *LARGE)
    x = normal(3, LARGE[1]).requires_grad_()
    out = torch.compile(nn.Sequential(layer, nn.Tanh()), backend="aot_eager")(x)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(torch.autograd.grad(out.sum(), x, create_graph=True)[0].sum(), x)


@each_method
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transforms_inside_a_compiled_function_have_the_straight_gradient(kernel, method):
    layer = random_layer(method, *LARGE)
    x = normal(LARGE[1])
    got = torch.compile(lambda y: torch.func.grad(lambda z: layer(z).sum())(y), backend="aot_eager")(x)
    torch.testing.assert_close(got, layer.dequantize().sum(0))


@each_method
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_export_takes_the_int8_product_where_it_is_asked_for_and_batches_of_any_size(method, monkeypatch):
    with_products(monkeypatch, has_plain=True)
    layer = random_layer(method, 30, 40)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    for kernel, products in (("auto", 0), ("int8", 1)):  # the program may run on a processor whose product saturates
        layer.kernel = kernel
        program = torch.export.export(nn.Sequential(layer), (normal(3, 40),), dynamic_shapes=shapes, strict=False)
        assert str(program.graph).count("aten._int_mm") == products
        for rows in (1, 5):
            x = normal(rows, 40, seed=rows)
            torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-4)


needs_packing = pytest.mark.skipif(
    not compiles_packed_product(), reason="needs AVX512-VNNI, and a torch that compiles for it"
)


def program_for_a_package(layer, x):
    with exporting_for_this_processor(), packing_in_graphs(), torch.no_grad():
        return torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False)


@needs_packing
@each_method
@pytest.mark.parametrize("shape", [(50, 33), (3, 2), (8, 518)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_program_for_a_package_multiplies_packed_codes_to_the_bits_of_plain_ones(method, shape):
    layer = random_layer(method, *shape)
    layer.kernel = "int8"
    x = torch.cat([normal(5, shape[1]), torch.zeros(1, shape[1]), torch.full((1, shape[1]), torch.nan)])
    plain = torch.export.export(layer, (x,), strict=False)
    packed = program_for_a_package(layer, x)
    assert "_int_mm" in str(plain.graph)
    assert "onednn.qlinear_pointwise" in str(packed.graph)
    assert "_int_mm" not in str(packed.graph)
    wanted, got = plain.module()(x), packed.module()(x)
    assert torch.equal(got[:-1], wanted[:-1])
    assert torch.equal(packed.module()(x[:1]), wanted[:1])
    assert not got[-1].isfinite().any()


@needs_packing
@each_method
def test_sums_that_float32_cannot_hold_are_those_of_plain_codes_unless_activations_are_of_one_digit(method):
    layer = random_layer(method, 4, 600)
    layer.int8_weights.fill_(127)  # the product of the digits plus 128 exceeds 2²⁴
    x = normal(3, 600)
    program = program_for_a_package(layer, x)
    assert ("_int_mm" in str(program.graph)) == (method not in ("w8a8", "w4a8"))
    assert relative_error(program.module()(x), layer(x).double()) < 1e-6


@pytest.mark.parametrize("method", ["w8a16", "w4a8"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_graph_of_any_size_has_the_gradients_of_each_of_its_layers(method):
    model = nn.Sequential(random_layer(method, 16, 24), random_layer(method, 8, 16))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 3):
        mine, alone = (normal(rows, 24, seed=rows).requires_grad_() for _ in range(2))
        compiled(mine).square().sum().backward()
        model(alone).square().sum().backward()
        assert relative_error(mine.grad, alone.grad.double()) < 1e-6


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(not takes_integers(48), reason="graphs multiply floats on this processor")
def test_what_comes_before_a_layer_is_computed_once_and_read_in_its_order():
    layer = random_layer("w8a8", 64, 48)
    layer.kernel = "int8"
    x = normal(5, 48, 3, seed=1).transpose(1, 2)
    with torch.no_grad():
        got, (code,) = run_and_get_code(torch.compile(nn.Sequential(nn.GELU(), layer), fullgraph=True), x)
        assert len(re.findall(r"\berf\(", code)) == 1
        assert relative_error(got, layer(nn.functional.gelu(x)).double()) < 1e-6


class OnAView(nn.Module):
    """A layer on a part of what comes before, as gated blocks and first tokens have it."""

    def __init__(self, layer, view):
        super().__init__()
        self.layer, self.view = layer, view

    def forward(self, x):
        return self.layer(self.view(nn.functional.gelu(x)))


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("view", [lambda x: x[:, 48:], lambda x: x.view(-1, 2, 48)[:, 1]], ids=["half", "place"])
def test_a_compiled_layer_reads_a_view_where_it_lies(view):
    model, x = OnAView(random_layer("w8a8", 64, 48), view), normal(5, 96, seed=1)
    model.layer.kernel = "int8"
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True)(x)
        assert relative_error(got, model(x).double()) < 1e-2


def test_a_layer_has_a_graph_where_the_strides_of_its_input_are_of_no_size_known():
    layer = random_layer("w8a8", 64, 48)
    layer.kernel = "int8"
    compiled = torch.compile(nn.Sequential(nn.GELU(), layer), backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (5, 9):
        x = normal(3, 48, tokens, seed=1).transpose(1, 2)
        with torch.no_grad():
            assert relative_error(compiled(x), layer(nn.functional.gelu(x)).double()) < 1e-2


@each_method
@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("freezing", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tuned_and_frozen_graphs_give_what_the_layers_give(method, freezing):
    model = nn.Sequential(random_layer(method, 64, 48), nn.GELU(), random_layer(method, 8, 64))
    compiled = torch.compile(model, mode="max-autotune", fullgraph=True, dynamic=True)
    with torch.no_grad(), config.patch(freezing=freezing):
        for rows in (7, 3):
            x = normal(rows, 48, seed=rows)
            assert relative_error(compiled(x), model(x).double()) < 1e-6


@each_method
@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kernel", ["auto", "int8"])
def test_a_package_that_is_compiled_ahead_of_time_runs_without_this_package(method, kernel, tmp_path):
    layer = random_layer(method, 64, 48)
    layer.kernel = kernel
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(layer, (normal(3, 48),), dynamic_shapes=shapes, strict=False)
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
    x = normal(9, 48)
    torch.save({"x": x, "wanted": layer(x).detach()}, tmp_path / "case.pt")
    code = """
import sys, torch
case = torch.load("case.pt")
out = torch._inductor.aoti_load_package("layer.pt2")(case["x"])
torch.testing.assert_close(out, case["wanted"], rtol=1e-4, atol=1e-4)
assert not any(name.startswith("tinyq") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)
