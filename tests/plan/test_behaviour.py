"""A layer is known by what its forward computes, not by its name or its class."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from tinyq_lightning import quantize, quantized
from tinyq_lightning.layers import QuantizedLinear, behaviour
from tinyq_lightning.plan import find_sites, quantized_weights


class Matrix(nn.Module):
    """No nn.Linear, with a weight ``[out, in]`` and a bias."""

    def __init__(self, columns=16, rows=32):
        super().__init__()
        self.columns, self.rows = columns, rows
        self.weight = nn.Parameter(torch.randn(rows, columns) * 0.1)
        self.bias = nn.Parameter(torch.randn(rows))

    def forward(self, x):
        return functional.linear(x, self.weight, self.bias)


class Linear(Matrix):
    """As torch_geometric has it: it writes its own state and copies itself, and may be lazy."""

    def __init__(self):
        super().__init__()
        self._load_hook = self._register_load_state_dict_pre_hook(self._lazy_load_hook)

    def __deepcopy__(self, memo):
        made = Linear()
        made.load_state_dict(self.state_dict())
        return made

    def reset_parameters(self):
        nn.init.zeros_(self.bias)

    def initialize_parameters(self, module, args):
        raise AssertionError

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight"] = self.weight.detach()
        destination[f"{prefix}bias"] = self.bias.detach()

    def _lazy_load_hook(self, *args):
        assert self.weight.dim() == 2


class LoadsLazily(Linear):
    """As a later torch_geometric has it."""

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        if torch.nn.parameter.is_lazy(self.weight):
            self.columns = state_dict[f"{prefix}weight"].size(-1)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class LoadsTurned(Matrix):
    """Its files hold the weight ``[in, out]``."""

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        turned = {**state_dict, f"{prefix}weight": state_dict[f"{prefix}weight"].T}
        super()._load_from_state_dict(turned, prefix, *args, **kwargs)


class Turned(nn.Module):
    """Its weight is ``[in, out]``."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(16, 32) * 0.1), nn.Parameter(torch.randn(32))

    def forward(self, x):
        return x @ self.weight + self.bias


class Square(Turned):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32) * 0.1)


class Einsum(Matrix):
    def forward(self, x):
        return torch.einsum("...i,oi->...o", x, self.weight) + self.bias


class Addmm(Matrix):
    def forward(self, x):
        out = torch.addmm(self.bias, x.reshape(-1, self.columns), self.weight.t())
        return out.view(*x.shape[:-1], self.rows)


class WithoutBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 16) * 0.1)

    def forward(self, x):
        return functional.linear(x, self.weight)


class Scriptable(nn.Linear):
    """As timm has it."""

    def forward(self, input):
        if torch.jit.is_scripting():
            return functional.linear(input, self.weight.to(input.dtype), None)
        return functional.linear(input, self.weight, self.bias)


class ByOperators(nn.Linear):
    """As Falcon has it."""

    def forward(self, hidden):
        out = hidden @ self.weight.T
        return out if self.bias is None else out + self.bias


@pytest.mark.parametrize(
    "make",
    [
        *(Linear, LoadsLazily, Turned, Square, Einsum, Addmm, WithoutBias),
        *(lambda: Scriptable(16, 32), lambda: ByOperators(16, 32), lambda: ByOperators(16, 32, bias=False).bfloat16()),
    ],
)
def test_what_computes_a_linear_layer_is_quantized_as_one(make):
    model = nn.Sequential(make(), nn.ReLU()).eval()
    layer = model[0]
    columns = layer.weight.shape[0 if isinstance(layer, Turned) else 1]
    x = torch.randn(5, 3, columns, dtype=layer.weight.dtype)
    wanted, random = model(x), torch.get_rng_state()
    with quantized(model, "w8a32") as plan:
        assert [(decision.name, decision.method, decision.reason) for decision in plan] == [("0", "w8a32", "spec")]
        assert isinstance(model[0], QuantizedLinear)
        assert (model(x) - wanted).norm() < 0.02 * wanted.norm()
        assert copy.deepcopy(model)(x).shape == wanted.shape
        assert set(model.state_dict()) == {
            "0.int8_weights",
            "0.scales",
            *({"0.bias"} if model[0].bias is not None else ()),
        }
    assert model[0] is layer
    assert torch.equal(random, torch.get_rng_state())


CALLS: list[int] = []


class Conv1D(Turned):
    """It has the name of a class that is quantized, and does something else."""

    nf = 32

    def forward(self, x):
        return 3 * torch.tanh(x @ self.weight + self.bias)


class Clamped(Matrix):
    def forward(self, x):
        return functional.linear(x, self.weight.clamp(-10, 10), self.bias)


class DropsInTraining(Matrix):
    def forward(self, x):
        return functional.linear(functional.dropout(x, 0.1, self.training), self.weight, self.bias)


class ScaledByOne(Matrix):
    def __init__(self):
        super().__init__()
        self.scale = 1.0

    def forward(self, x):
        return self.scale * functional.linear(x, self.weight, self.bias)


class Counted(Matrix):
    def forward(self, x):
        CALLS.append(1)
        return functional.linear(x, self.weight, self.bias)


class StopsGradients(Matrix):
    def forward(self, x):
        return functional.linear(x.detach(), self.weight, self.bias)


class OtherMethod(Matrix):
    def row(self, index):
        return self.weight[index]


@pytest.mark.parametrize(
    "make", [Conv1D, Clamped, DropsInTraining, ScaledByOne, Counted, StopsGradients], ids=lambda each: each.__name__
)
def test_a_class_that_does_something_else_is_in_no_plan_and_is_not_run(make):
    model = nn.Sequential(make(), nn.Linear(32, 4)).eval()
    layer = model[0]
    CALLS.clear()
    plan = quantize(model)
    assert [decision.name for decision in plan] == ["1"]
    assert model[0] is layer
    assert CALLS == []
    assert [(other.name, other.shape) for other in plan.others] == [("0.weight", tuple(layer.weight.shape))]


class LowRank(nn.Linear):
    """An adapter that adds nothing yet."""

    def __init__(self):
        super().__init__(16, 32)
        self.down, self.up = nn.Parameter(torch.randn(2, 16)), nn.Parameter(torch.zeros(32, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


class InFloat32(nn.Linear):
    @torch.autocast("cpu", enabled=False)
    def forward(self, x):
        return super().forward(x)


class TwoInputs(nn.Linear):
    def forward(self, x, scale=None):
        return super().forward(x) if scale is None else scale * super().forward(x)


class OtherForLargeBatches(nn.Linear):
    def forward(self, x):
        return super().forward(x) * (2 if x.numel() > 1000 else 1)


class DrawsNumbers(nn.Linear):
    def forward(self, x):
        torch.rand(1)
        return super().forward(x)


class WithExtraState(nn.Linear):
    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        assert state == {"steps": 3}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (LowRank, "LowRank has a forward of its own"),
        (lambda: InFloat32(16, 32), "InFloat32 has a forward of its own"),
        (lambda: TwoInputs(16, 32), "TwoInputs has a forward of its own"),
        (lambda: OtherForLargeBatches(16, 32), "OtherForLargeBatches has a forward of its own"),
        (lambda: DrawsNumbers(16, 32), "DrawsNumbers has a forward of its own"),
        (lambda: WithExtraState(16, 32), "WithExtraState adds get_extra_state, set_extra_state to nn.Linear"),
        (LoadsTurned, "LoadsTurned adds _load_from_state_dict to what nn.Linear has"),
        (OtherMethod, "OtherMethod adds row to what nn.Linear has"),
    ],
)
def test_what_is_more_than_a_linear_layer_stays_float_with_the_reason(make, reason):
    model = nn.ModuleDict({"layer": make(), "plain": nn.Linear(4, 4)})
    state = set(model["layer"].state_dict())
    plan = quantize(model)
    assert (plan.decisions[0].method, plan.decisions[0].reason) == ("float", reason)
    assert set(model["layer"].state_dict()) == state


class TellsItsStride(nn.Conv2d):
    """As torchvision's convolutions for video, which are asked for their stride before they are made."""

    @staticmethod
    def stride_of(stride):
        return stride, 1


class HasAStaticForward(nn.Conv2d):
    @staticmethod
    def _conv_forward(x, weight, bias):
        return x


def test_a_static_method_does_not_keep_a_layer_float_and_can_still_be_called():
    model = nn.ModuleDict({"told": TellsItsStride(3, 4, 3), "other": HasAStaticForward(3, 4, 3)})
    wanted = model["told"](x := torch.randn(2, 3, 5, 5))
    assert [decision.method for decision in quantize(model)] == ["w8a32", "float"]
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert each["told"].stride_of(2) == (2, 1)
        torch.testing.assert_close(each["told"](x), wanted, rtol=0.1, atol=0.1)


class TimesNumber(nn.Embedding):
    def __init__(self, *args):
        super().__init__(*args)
        self.embed_scale = 8.0

    def forward(self, input_ids):
        return super().forward(input_ids) * self.embed_scale


class TimesBuffer(nn.Embedding):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("embed_scale", torch.tensor(8.0), persistent=False)

    def forward(self, input_ids):
        return super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)


class TimesRoot(nn.Embedding):
    def forward(self, input_ids):
        return super().forward(input_ids) * math.sqrt(self.embedding_dim)


class TimesParameter(nn.Embedding):
    def __init__(self, *args):
        super().__init__(*args)
        self.gain = nn.Parameter(torch.tensor(8.0))

    def forward(self, input_ids):
        return super().forward(input_ids) * self.gain


class Normed(nn.Embedding):
    def forward(self, input_ids):
        return functional.layer_norm(super().forward(input_ids), (self.embedding_dim,))


class Words(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.embed, self.head = embedding(100, 64), nn.Linear(64, 100, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words):
        return self.head(self.embed(words))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("embedding", [TimesNumber, TimesBuffer, TimesRoot])
def test_an_embedding_with_a_factor_is_quantized_with_the_layer_it_is_tied_to(embedding, dtype):
    model, words = Words(embedding).to(dtype), torch.randint(100, (2, 5))
    wanted = model(words).float()
    plan = quantize(model)
    assert {decision.name: decision.method for decision in plan} == {"embed": "w8a32", "head": "w8a32"}
    assert model.embed.int8_weights is model.head.int8_weights
    assert (model(words).float() - wanted).norm() < 0.02 * wanted.norm()
    assert "embed.embed_scale" not in model.state_dict()
    assert getattr(model.embed, "embed_scale", 8.0) == 8.0
    torch.testing.assert_close(copy.deepcopy(model)(words), model(words))


@pytest.mark.parametrize("embedding", [TimesParameter, Normed])
def test_an_embedding_that_does_more_keeps_its_tie_float(embedding):
    model = Words(embedding)
    reasons = {decision.name: decision.reason for decision in quantize(model)}
    assert reasons["embed"] == f"{embedding.__name__} has a forward of its own"
    assert reasons["head"].startswith("tied to embed.weight")


def test_a_square_matrix_whose_sizes_are_attributes_is_known_by_what_it_computes():
    class Counted(Square):
        """As Hugging Face has the output projection of GPT-2's attention."""

        def __init__(self):
            super().__init__()
            self.nf, self.nx = 32, 32

        def forward(self, x):
            return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)

    model, x = nn.Sequential(Counted()), torch.randn(2, 3, 32)
    wanted = model(x)
    assert [decision.method for decision in quantize(model)] == ["w8a32"]
    assert torch.allclose(model(x), wanted, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_that_is_held_transposed_gets_its_values_back(dtype):
    model = nn.Sequential(Turned())
    site = find_sites(model)[0]
    layer = site.kind.make(site.module, quantized_weights(site)[0], "w8a32", "auto").to(dtype)
    site.kind.restore(site.module, site.original, layer)
    assert model[0].weight.dtype == dtype
    assert torch.equal(model[0].weight, layer.weight.t())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_layer_is_known_where_gradients_are_off(mode):
    behaviour._computes_linear.cache_clear()
    with mode():
        assert [decision.method for decision in quantize(nn.Sequential(Turned()), "w8a32")] == ["w8a32"]
