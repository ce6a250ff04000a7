"""Quantized layers in graphs: compiled, exported, traced."""

import pytest
import torch
from kernel_cases import LARGE, each_method, normal, random_layer, relative_error
from torch import nn


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
    torch._dynamo.reset()
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
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-2, atol=1e-2)
    held = [*program.state_dict.values(), *program.constants.values()]
    assert [tensor.shape for tensor in held if tensor.dtype == torch.int8] == [torch.Size(LARGE)]
    assert not [node for node in program.graph.nodes if "tinyq" in str(node.target)]
