"""Layers that are called with the tensors of other models, as torch.func does it."""

import copy

import pytest
import torch
from kernel_cases import normal
from torch import nn
from torch._dynamo.exc import Unsupported

from tinyq_lightning import quantize
from tinyq_lightning.errors import ModelError

TOKENS = torch.tensor([1, 3, 19, 0])


class Tied(nn.Module):
    """Rows that are looked up, and the same weight as a head."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.embed(TOKENS) * x))


NETS = {
    "linear": (lambda: nn.Sequential(nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 4)), (3, 16)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.Tanh(), nn.Conv2d(8, 2, 1)), (3, 4, 6, 5)),
    "tied": (Tied, (4, 16)),
}
each_net = pytest.mark.parametrize("net", NETS)
each_kernel = pytest.mark.parametrize("spec", [{"method": "w8a32"}, {"method": "w4a32", "kernel": "compact"}])


def models_of(net, spec):
    """Two models, an input, and what each gives; none has been called."""
    make, shape = NETS[net]
    models, x = [], normal(*shape)
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(make().eval())
        quantize(models[-1], spec)
    with torch.no_grad():
        return models, x, torch.stack([copy.deepcopy(model)(x) for model in models])


@each_net
@each_kernel
@pytest.mark.parametrize("on_meta", [False, True])
@torch.no_grad()
def test_an_ensemble_gives_what_its_models_give(net, spec, on_meta):
    models, x, wanted = models_of(net, spec)
    base = copy.deepcopy(models[0])
    base = base.to("meta") if on_meta else base
    stacked = torch.func.stack_module_state(models)

    def call(parameters, buffers):
        return torch.func.functional_call(base, (parameters, buffers), (x,))

    torch.testing.assert_close(torch.vmap(call)(*stacked), wanted, rtol=1e-4, atol=1e-5)
    for index in (1, 0, 1):
        one = {name: value[index] for each in stacked for name, value in each.items()}
        got = torch.func.functional_call(base, one, (x,))
        torch.testing.assert_close(got, wanted[index], rtol=1e-4, atol=1e-5)
        assert all(value is not None for value in one.values())  # torch puts back what the layers hold after the call
    if not on_meta:
        torch.testing.assert_close(base(x), wanted[0], rtol=1e-4, atol=1e-5)


@each_net
@each_kernel
@torch.no_grad()
def test_an_ensemble_of_models_that_were_called_is_right_or_refused(net, spec):
    models, x, wanted = models_of(net, spec)
    base = copy.deepcopy(models[0]).to("meta")
    for model in models:
        model(x)

    def call(parameters, buffers):
        return torch.func.functional_call(base, (parameters, buffers), (x,))

    told = "stack_module_state([copy.deepcopy(model) for model in models])"
    try:
        got = torch.vmap(call)(*torch.func.stack_module_state(models))
    except ModelError as refused:
        told = str(refused)
        got = torch.vmap(call)(*torch.func.stack_module_state([copy.deepcopy(model) for model in models]))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert "stack_module_state([copy.deepcopy(model) for model in models])" in told


OTHERS = {
    "buffers": lambda model: {**dict(model.named_parameters()), **dict(model.named_buffers())},
    "detached": lambda model: {name: value.detach() for name, value in OTHERS["buffers"](model).items()},
    "state dict": lambda model: {**dict(model.named_parameters()), **model.state_dict()},
}


@each_net
@each_kernel
@pytest.mark.parametrize("taken", OTHERS)
@pytest.mark.parametrize("called", [(True, True), (False, True), (True, False)])
@torch.no_grad()
def test_a_model_called_with_the_tensors_of_another_gives_what_that_gives_or_refuses(net, spec, taken, called):
    models, x, wanted = models_of(net, spec)
    for model, is_called in zip(models, called, strict=True):
        if is_called:
            model(x)
    theirs = OTHERS[taken](models[1])
    told = None
    try:
        got = torch.func.functional_call(models[0], theirs, (x,), tie_weights=taken != "state dict")
    except ModelError as refused:
        told = str(refused)
    else:
        torch.testing.assert_close(got, wanted[1], rtol=1e-4, atol=1e-5)
    if told is not None:
        assert "dict(model.named_buffers())" in told
        assert taken != "state dict" or "4" in spec["method"]  # whose packed codes are no buffers
    assert all(value is not None for value in theirs.values())
    torch.testing.assert_close(models[0](x), wanted[0], rtol=1e-4, atol=1e-5)


@each_net
@each_kernel
@torch.no_grad()
def test_a_model_called_with_its_own_tensors_leaves_them_where_they_are(net, spec):
    models, x, wanted = models_of(net, spec)
    own = OTHERS["buffers"](models[0])
    names = set(own)
    for _ in range(2):
        got = torch.func.functional_call(models[0], own, (x,))
        torch.testing.assert_close(got, wanted[0], rtol=1e-4, atol=1e-5)
        assert {name for name, value in own.items() if value is not None} == names
    models[0](x)


def test_a_layer_that_has_packed_its_codes_can_be_called_with_scales_of_the_callers():
    (model, _), _, _ = models_of("linear", {"method": "w4a32", "kernel": "compact"})
    layer, x = model[0], normal(30, 16)
    layer(x)

    def norm(scales):
        given = {"bias": 0 * layer.bias, "int8_weights": layer.int8_weights, "scales": scales}
        return torch.func.functional_call(layer, given, (x,)).norm()

    torch.testing.assert_close(norm(2 * layer.scales), 2 * norm(layer.scales))
    of_scales = torch.func.grad(norm)(layer.scales)
    torch.testing.assert_close(of_scales @ layer.scales, norm(layer.scales))
    layer(x)  # packs them again
    copied = torch.func.functional_call(layer, {"scales": layer.scales.clone()}, (x,))
    assert torch.equal(copied, layer(x))
    with pytest.raises(ModelError, match="scales that are not its own"):
        torch.func.functional_call(layer, {"scales": 2 * layer.scales}, (x,))
    layer(x)


@pytest.mark.parametrize(("net", "graph_first"), [("linear", False), ("conv", True), ("tied", True)])
@torch.no_grad()
def test_a_graph_refuses_the_tensors_of_another_that_lack_its_packed_codes(net, graph_first):
    spec = {"method": "w4a32", "kernel": "compact"}
    models, x, wanted = models_of(net, spec)
    for model in models:
        model(x)
    theirs = OTHERS["buffers"](models[1])
    if graph_first:  # which unpacks all layers: those tensors were taken before
        torch.compile(models[0], backend="eager")(x)

    def call(x, tensors):
        return torch.func.functional_call(models[0], tensors, (x,))

    for fullgraph in (True, False):
        told = (RuntimeError, ModelError, Unsupported)
        with pytest.raises(told, match="scales that are not its own" if graph_first or not fullgraph else None):
            torch.compile(call, backend="eager", fullgraph=fullgraph)(x, theirs)
    with pytest.raises(ModelError, match="scales that are not its own"):
        call(x, theirs)
    torch._dynamo.reset()  # it would go on with the graph that it broke
    taken_now = OTHERS["buffers"](copy.deepcopy(models[1]))
    torch.compile(models[0], backend="eager")(x)
    got = torch.compile(call, backend="eager", fullgraph=True)(x, taken_now)
    torch.testing.assert_close(got, wanted[1], rtol=1e-4, atol=1e-5)
    for own in ("buffers", "detached"):
        got = torch.compile(call, backend="eager", fullgraph=True)(x, OTHERS[own](models[0]))
        torch.testing.assert_close(got, wanted[0], rtol=1e-4, atol=1e-5)
