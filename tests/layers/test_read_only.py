"""The weight of a quantized layer: read like any tensor, and an error for whoever writes to it."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tinyq_lightning import W8A32LinearLayer
from tinyq_lightning.errors import ReadOnlyWeightError
from tinyq_lightning.layers.embedding import QuantizedEmbedding


def quantized_layer(**kwargs):
    return W8A32LinearLayer.from_linear(nn.Linear(6, 4, **kwargs))


def assign_row(weight):
    weight[0] = 1


def multiply(weight):
    weight *= 2


def assign_data(weight):
    weight.data = torch.zeros(4, 6)


def copy_without_grad(weight):
    with torch.no_grad():
        weight.copy_(torch.zeros(4, 6))


WRITES = [
    lambda weight: weight.fill_(0),
    lambda weight: weight.data.fill_(0),
    lambda weight: weight.data.clamp_(-1, 1),
    lambda weight: weight.detach().zero_(),
    lambda weight: weight.mul_(2),
    nn.init.xavier_uniform_,
    nn.init.kaiming_normal_,
    nn.init.trunc_normal_,
    nn.init.orthogonal_,
    nn.init.zeros_,
    assign_row,
    multiply,
    assign_data,
    copy_without_grad,
    torch.inference_mode()(lambda weight: weight.normal_()),
    lambda weight: weight.requires_grad_(),
    nn.Parameter,
]


@pytest.mark.parametrize("write", WRITES)
def test_writing_to_the_weight_is_an_error_that_says_what_to_do(write):
    layer = quantized_layer()
    before = layer.int8_weights.clone()
    with pytest.raises(ReadOnlyWeightError, match=r"would be lost.*\.quantize\(weight\).*\.clone\(\)"):
        write(layer.weight)
    assert torch.equal(layer.int8_weights, before)


VIEWS = {
    "view": lambda weight: weight.view(-1),
    "view of a view": lambda weight: weight.data.view(2, 12).t(),
    "row": lambda weight: weight[1],
    "narrow": lambda weight: weight.narrow(0, 1, 2),
    "parts": lambda weight: weight.chunk(2)[1],
    "rows": lambda weight: weight.unbind()[2],
    "detached": lambda weight: torch.detach(weight.T),
    "diagonal": lambda weight: torch.diagonal(weight),
    "bits": lambda weight: weight.view(torch.int32),
    "reshape": lambda weight: weight.reshape(2, -1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize(
    "write",
    [
        lambda view: view.copy_(view * 2),
        lambda view: view.data.zero_(),
        lambda view: torch.mul(view, 2, out=view),
        lambda view: torch._foreach_neg_([view]),
        lambda view: view.__setitem__(0, 0),
    ],
)
@torch.no_grad()
def test_writing_to_a_view_of_the_weight_is_the_same_error(view, write):
    layer = quantized_layer()
    wanted = view(layer.dequantize())
    assert torch.equal(view(layer.weight), wanted)
    with torch.inference_mode():
        assert torch.equal(view(layer.weight), wanted)
        weight = layer.weight
    assert torch.equal(view(weight), wanted)
    with pytest.raises(ReadOnlyWeightError, match=r"would be lost.*\.quantize\(weight\).*\.clone\(\)"):
        write(view(layer.weight))
    got = view(layer.weight).clone()
    assert type(got) is Tensor
    assert (got.stride(), got.dtype) == (wanted.clone().stride(), wanted.dtype)
    got.zero_()
    assert torch.equal(view(layer.weight), wanted)


def test_gradients_pass_to_what_a_view_is_multiplied_with():
    layer, x = quantized_layer(bias=False), torch.randn(3, 6, requires_grad=True)
    (x @ layer.weight[1:3].T).square().sum().backward()
    plain = x.detach().requires_grad_()
    (plain @ layer.dequantize()[1:3].T).square().sum().backward()
    torch.testing.assert_close(x.grad, plain.grad)


def test_augmented_assignment_to_the_layer_is_an_error_and_so_is_an_embeddings_weight():
    layer = quantized_layer()
    with pytest.raises(ReadOnlyWeightError):
        layer.weight *= 2
    with pytest.raises(ReadOnlyWeightError):
        layer.weight = torch.zeros(4, 6)
    with pytest.raises(ReadOnlyWeightError):
        QuantizedEmbedding(5, 3).weight.data.uniform_()


def saved(weight):
    file = io.BytesIO()
    torch.save({"weight": weight}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["weight"]


COPIES = {
    "clone": lambda weight: weight.clone(),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda weight: pickle.loads(pickle.dumps(weight)),
    "save": saved,
    "numpy": lambda weight: torch.from_numpy(np.asarray(weight).copy()),
    "transposed": lambda weight: weight.T.contiguous().T,
    "into": lambda weight: torch.zeros(4, 6).copy_(weight),
    "parameter": lambda weight: nn.Parameter(weight.clone()).data,
    "meta": lambda weight: weight.to("meta").shape and weight * 1,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_are_plain_tensors_that_can_be_written_to(copied):
    layer = quantized_layer()
    got = copied(layer.weight)
    assert type(got) is Tensor
    assert torch.equal(got, layer.dequantize())
    got.zero_()


def test_one_copy_is_made_of_a_weight_that_is_held_twice():
    weight = quantized_layer().weight
    first, second = copy.deepcopy([weight, weight])
    assert first is second


READS = {
    "linear": lambda x, weight: nn.functional.linear(x, weight),
    "matmul": lambda x, weight: x @ weight.T,
    "first": lambda x, weight: (weight @ x.T).T,
    "einsum": lambda x, weight: torch.einsum("bi,oi->bo", x, weight),
    "autocast": lambda x, weight: torch.autocast("cpu", torch.bfloat16)(nn.functional.linear)(x, weight).float(),
    "call": lambda x, weight: torch.func.functional_call(nn.Linear(6, 4, bias=False), {"weight": weight}, (x,)),
    "frozen": lambda x, weight: nn.functional.linear(x, weight.requires_grad_(False)),
    "cast": lambda x, weight: nn.functional.linear(x, weight.to(x)),
    "vmap": lambda x, weight: torch.vmap(lambda row: weight @ row)(x),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_reads_give_plain_tensors_and_gradients_pass_to_inputs(read):
    layer, x = quantized_layer(bias=False), torch.randn(3, 6, requires_grad=True)
    got = read(x, layer.weight)
    assert type(got) is Tensor
    torch.testing.assert_close(got, x @ layer.dequantize().T, atol=0.03, rtol=0.03)
    got.sum().backward()
    assert x.grad is not None


class Reader(nn.Module):
    """Third-party code that goes past the layer."""

    def __init__(self):
        super().__init__()
        self.layer = quantized_layer()

    def forward(self, x):
        weight = self.layer.weight
        assert weight.device == x.device
        return nn.functional.linear(x.to(weight.dtype), weight, self.layer.bias)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "made",
    [
        lambda model, x: torch.compile(model, fullgraph=True, backend="aot_eager"),
        lambda model, x: torch.export.export(model, (x,)).module(),
        lambda model, x: torch.export.export(model, (x,), strict=False).module(),
        lambda model, x: torch.jit.trace(model, (x,)),
        lambda model, x: copy.deepcopy(model),
    ],
)
def test_code_that_reads_the_weight_is_compiled_exported_and_traced(made):
    model, x = Reader().eval(), torch.randn(3, 6)
    with torch.no_grad():
        torch.testing.assert_close(made(model, x)(x), model(x))
