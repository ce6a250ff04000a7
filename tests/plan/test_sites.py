"""Ties are kept, and every kind of Linear has a decision with its reason."""

from __future__ import annotations

import copy
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from tinyq_lightning import Quantizer, W8A32LinearLayer, quantize, quantized, replace_linear_with_target_and_quantize
from tinyq_lightning.errors import ModelError, SpecError
from tinyq_lightning.layers.embedding import QuantizedEmbedding
from tinyq_lightning.layers.linear import QuantizedLinear
from tinyq_lightning.plan.plan import state_bytes

WORDS, SIZE = 400, 64


class Coder(nn.Module):
    """Words in, words out, by one matrix; as a language model or T5 has it."""

    def __init__(self, **kwargs):
        super().__init__()
        self.embed = nn.Embedding(WORDS, SIZE, **kwargs)
        self.body = nn.Linear(SIZE, SIZE)
        self.head = nn.Linear(SIZE, WORDS)
        self.second = nn.Linear(SIZE, WORDS, bias=False)
        self.head.weight = self.second.weight = self.embed.weight

    def forward(self, words):
        hidden = self.body(self.embed(words))
        return self.head(hidden) + self.second(hidden)


def decisions(model, spec="w8a32"):
    with quantized(model, spec) as plan:
        return {decision.name: (decision.method, decision.reason) for decision in plan}


def saved(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return len(file.getvalue())


def test_a_tied_matrix_is_quantized_once_and_shared_by_look_ups_and_products():
    model = Coder(padding_idx=0)
    words = torch.randint(WORDS, (2, 7))
    wanted, before, file_before = model(words), state_bytes(model.state_dict()), saved(model)
    plan = quantize(model, "w8a32")
    assert {d.name: d.reason for d in plan} == {
        "embed": "tied to head.weight",
        "body": "spec",
        "head": "spec",
        "second": "spec",
    }
    assert isinstance(model.embed, QuantizedEmbedding)
    assert model.embed.padding_idx == 0
    assert model.head.int8_weights is model.embed.int8_weights is model.second.int8_weights
    assert model.head.scales is model.embed.scales is model.second.scales
    assert torch.equal(model.embed(words), model.head.weight[words])
    assert ((model(words) - wanted).norm() / wanted.norm()) < 0.02
    assert sum(d.bytes for d in plan) == state_bytes(model.state_dict()) < 0.3 * before
    assert saved(model) < 0.45 * file_before  # of 120 kB: the overhead of a file shows


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_tie_survives_copies_and_casts_and_moves(copied):
    model = Coder()
    quantize(model)
    codes = model.head.int8_weights.clone()
    model = copied(model).to(torch.bfloat16)
    assert model.head.int8_weights is model.embed.int8_weights
    assert model.embed(torch.tensor([3])).dtype == torch.bfloat16
    assert model.embed.scales.dtype == torch.float32
    assert torch.equal(model.embed.int8_weights, codes)
    model.to("meta")
    assert model.head.int8_weights is model.embed.int8_weights is model.second.int8_weights
    assert model.head.scales is model.embed.scales


def test_a_tie_survives_a_state_dict():
    model, other = Coder(), Coder()
    quantize(model)
    quantize(other)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert state["head.int8_weights"].data_ptr() == state["embed.int8_weights"].data_ptr()
    other.load_state_dict(state)
    assert other.head.int8_weights is other.embed.int8_weights
    words = torch.randint(WORDS, (2, 7))
    assert torch.equal(other(words), model(words))


@pytest.mark.parametrize("name", ["embed", "head", "second"])
def test_excluding_one_end_of_a_tie_leaves_all_of_it_float(name):
    model = Coder()
    got = decisions(model, {"method": "w8a32", "exclude": [name]})
    assert got["body"] == ("w8a32", "spec")
    for each in {"embed", "head", "second"} - {name}:
        assert got[each] == ("float", f"tied to {name}.weight (excluded)")
    assert got[name] == ("float", "excluded")


def test_layers_tied_to_one_another_may_differ_in_method_but_not_in_being_float():
    model = Coder()
    got = decisions(model, {"method": "w8a32", "rules": [{"match": "second", "method": "w8a8"}]})
    assert got == {
        "embed": ("w8a32", "tied to head.weight"),
        "body": ("w8a32", "spec"),
        "head": ("w8a32", "spec"),
        "second": ("w8a8", "rule 1"),
    }
    got = decisions(
        model,
        {"method": "float", "rules": [{"match": "second", "method": "w8a8"}, {"match": "body", "method": "w8a8"}]},
    )
    assert got["second"] == ("float", "tied to head.weight (spec), against rule 1")


def test_an_embedding_follows_its_only_linear():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9), "other": nn.Embedding(3, 3)})
    model["head"].weight = model["embed"].weight
    got = decisions(model, {"method": "float", "rules": [{"match": "head", "method": "w8a8"}]})
    assert got == {
        "embed": ("w8a32", "tied to head.weight; a look-up has no activations"),
        "head": ("w8a8", "rule 1"),
        "other": ("float", "spec"),
    }


def test_weights_that_share_memory_without_being_one_parameter_are_tied_too():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight.data = first.weight.data
    model = nn.Sequential(first, second)
    quantize(model)
    assert model[0].int8_weights is model[1].int8_weights


def test_swapping_back_leaves_the_float_tie_as_it_was():
    model = Coder()
    modules, weight = dict(model.named_modules()), model.embed.weight
    with quantized(model, "w8a8"):
        assert model.head.int8_weights is model.embed.int8_weights
    assert dict(model.named_modules()) == modules
    assert model.embed.weight is weight is model.head.weight


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.mine = self.linear.weight


def transposed():
    model = nn.ModuleDict({"encode": nn.Linear(6, 4), "decode": nn.Linear(4, 6)})
    model["decode"].weight = nn.Parameter(model["encode"].weight.detach().t())
    return model


def renormed():
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4, max_norm=1.0), "linear": nn.Linear(4, 6)})
    model["linear"].weight = model["embed"].weight
    return model


@pytest.mark.parametrize(
    ("model", "reasons"),
    [
        (Holder(), {"linear": "tied to mine"}),
        (transposed(), {"encode": "tied to decode.weight", "decode": "tied to encode.weight"}),
        (
            renormed(),
            {"embed": "max_norm rewrites its rows", "linear": "tied to embed.weight (max_norm rewrites its rows)"},
        ),
    ],
    ids=["parameter", "transposed", "max_norm"],
)
def test_what_shares_its_weight_with_something_else_stays_float_with_the_reason(model, reasons):
    size = state_bytes(model.state_dict())
    assert decisions(model) == {name: ("float", reason) for name, reason in reasons.items()}
    with quantized(model, "w8a32"):
        assert state_bytes(model.state_dict()) == size


def test_slices_of_one_flat_buffer_are_no_tie():
    flat = torch.randn(32)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[0].weight, model[1].weight = nn.Parameter(flat[:16].view(4, 4)), nn.Parameter(flat[16:].view(4, 4))
    assert decisions(model) == {"0": ("w8a32", "spec"), "1": ("w8a32", "spec")}


class OnlyBuiltOtherwise(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)

    def reset_parameters(self):
        nn.init.ones_(self.weight)


def test_a_tied_weight_that_int8_makes_no_smaller_stays_one_float():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 1), "head": nn.Linear(1, 9), "plain": nn.Linear(4, 4)})
    model["head"].weight = model["embed"].weight
    plan = quantize(model)
    assert [(d.name, d.method) for d in plan] == [("embed", "float"), ("head", "float"), ("plain", "w8a32")]
    assert {d.reason for d in plan if d.method == "float"} == {
        "int8 is no smaller: 1 + 4 bytes a row, 4 as float",
        "tied to head.weight (int8 is no smaller: 1 + 4 bytes a row, 4 as float)",
    }
    assert model["head"].weight is model["embed"].weight


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class OwnMethod(nn.Linear):
    def row(self, index):
        return self.weight[index]


def pruned():
    return prune.random_unstructured(nn.Linear(4, 4), "weight", amount=0.5)


def patched():
    linear = nn.Linear(4, 4)
    linear.forward = lambda x: x
    return linear


def sparse():
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.eye(4).to_sparse())
    return linear


class OtherTensor(torch.Tensor):
    pass


def subclassed():
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.randn(4, 4).as_subclass(OtherTensor))
    return linear


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("make", "method", "reason"),
    [
        (OnlyBuiltOtherwise, "w8a32", "spec"),
        (lambda: OwnForward(4, 4), "float", "OwnForward has a forward of its own"),
        (lambda: OwnMethod(4, 4), "float", "OwnMethod adds row to nn.Linear"),
        (patched, "float", "its forward was replaced"),
        (pruned, "w8a32", "spec; its weight is fixed as RandomUnstructured computes it from weight_orig, weight_mask"),
        (lambda: prune.remove(pruned(), "weight"), "w8a32", "spec"),
        (
            lambda: spectral_norm(nn.Linear(4, 4)),
            "w8a32",
            "spec; its weight is fixed as SpectralNorm computes it from weight_orig, weight_u, weight_v",
        ),
        (
            lambda: nn.utils.weight_norm(nn.Linear(4, 4)),
            "w8a32",
            "spec; its weight is fixed as WeightNorm computes it from weight_g, weight_v",
        ),
        (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "w8a32", "spec"),
        (lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), "w8a32", "spec"),
        (sparse, "float", "its weight is sparse_coo"),
        (subclassed, "float", "its weight has the type OtherTensor"),
        (lambda: nn.Linear(4, 4).requires_grad_(False), "w8a32", "spec"),
        (lambda: nn.Linear(5, 4).bfloat16(), "w8a32", "spec"),
        (lambda: nn.Linear(5, 4).half(), "w8a32", "spec"),
        (lambda: nn.Linear(4, 4).double(), "w8a32", "spec"),
        (lambda: W8A32LinearLayer(4, 4), "w8a32", "already quantized"),
        (lambda: nn.Linear(1, 1), "float", "int8 is no smaller: 1 + 4 bytes a row, 4 as float"),
        (lambda: nn.Linear(4, 9).half(), "float", "int8 is no smaller: 4 + 4 bytes a row, 8 as float"),
        (lambda: nn.Linear(2, 1), "w8a32", "spec"),
        (lambda: nn.Linear(1, 3).double(), "w8a32", "spec"),
        (lambda: torch.compile(nn.Linear(4, 4), backend="eager"), "w8a32", "spec"),
    ],
    ids=lambda each: getattr(each, "__name__", None),
)
def test_each_kind_of_linear_has_a_decision_and_works_on(make, method, reason):
    model = nn.ModuleDict({"layer": make(), "plain": nn.Linear(4, 4)})
    dtype = next((p.dtype for p in model["layer"].parameters()), torch.float32)
    layer, wanted = model.eval()["layer"], None
    x = torch.randn(3, getattr(layer, "_orig_mod", layer).in_features, dtype=dtype)
    if not reason.startswith("its weight has") and reason != "its weight is sparse_coo":
        wanted = layer(x)
    plan = {d.name: d for d in quantize(model)}
    assert (plan["layer"].method, plan["layer"].reason) == (method, reason)
    if method == "float":
        assert model["layer"] is layer
    if wanted is not None:
        got = model["layer"](x)
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, atol=0.05, rtol=0.05)


def test_spectral_norm_in_training_mode_is_read_without_a_step():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4))).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with quantized(model, "w8a32"):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_parametrizations_that_share_a_matrix_stay_float():
    first, second = (parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(2))
    second.parametrizations.weight.original1 = first.parametrizations.weight.original1
    got = decisions(nn.ModuleDict({"first": first, "second": second, "plain": nn.Linear(2, 2)}))
    assert got["first"] == ("float", "tied to second.parametrizations.weight.original1")


def test_a_lazy_linear_is_quantized_once_it_has_a_weight():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    with pytest.raises(ModelError, match=r"0: this LazyLinear has no weight yet: run one batch"):
        quantize(model)
    assert decisions(model, {"exclude": ["0"]})["0"] == ("float", "excluded")
    model(torch.randn(2, 5))
    assert decisions(model)["0"] == ("w8a32", "spec")


def test_attributes_and_hooks_of_a_layer_go_over_to_the_quantized_one():
    model, calls = nn.Sequential(nn.Linear(3, 2)), []
    model[0].role = "gate"
    model[0].register_forward_hook(lambda *args: calls.append("after"))
    model[0].register_forward_pre_hook(lambda *args: calls.append("before"))
    quantize(model)
    model(torch.randn(1, 3))
    assert model[0].role == "gate"
    assert calls == ["before", "after"]


class Conv1D(nn.Module):
    """As ``transformers.pytorch_utils.Conv1D``, which GPT-2 is made of."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.3)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.nf)


def test_hugging_face_conv1d_is_quantized_by_output_feature():
    model = nn.ModuleDict({"attn": Conv1D(9, 4)})
    conv, x = model["attn"], torch.randn(2, 3, 4)
    wanted = conv(x)
    with quantized(model, "w8a32") as plan:
        (decision,) = plan
        layer = model["attn"]
        assert isinstance(layer, QuantizedLinear)
        assert (decision.name, decision.method) == ("attn", "w8a32")
        assert tuple(layer.int8_weights.shape) == (9, 4)
        assert (layer.nf, layer.nx) == (9, 4)
        assert layer.bias is conv.bias
        torch.testing.assert_close(layer(x), wanted, atol=0.05, rtol=0.05)
        torch.testing.assert_close(layer.weight, conv.weight.t(), atol=0.01, rtol=0)
    assert model["attn"] is conv
    tied = nn.ModuleDict({"attn": conv, "linear": nn.Linear(9, 4), "conv": Conv1D(9, 4)})
    tied["linear"].weight = conv.weight
    assert decisions(tied)["linear"] == ("float", "tied to attn.weight")
    conv.weight = tied["conv"].weight
    quantize(tied)
    assert tied["attn"].int8_weights is tied["conv"].int8_weights


@pytest.mark.parametrize("module", [nn.MultiheadAttention(8, 2), Conv1D(3, 2)], ids=["attention", "conv1d"])
def test_a_root_that_would_itself_be_replaced_is_refused_or_returned(module):
    with pytest.raises(ModelError, match="cannot be replaced in place"):
        quantize(module)
    assert any(isinstance(each, QuantizedLinear) for each in Quantizer(module).quantize().modules())
    with pytest.raises(SpecError, match="without a name"):
        replace_linear_with_target_and_quantize(module, W8A32LinearLayer, ["x"])


class Foreign(nn.Module):
    """A class of the tutorial's kind, which knows Linears only."""

    def __init__(self, in_features, out_features, bias=True):
        super().__init__()
        self.bias = None

    def quantize(self, weight):
        self.codes = weight


def test_a_foreign_class_stands_for_linears_on_their_own_only():
    model = nn.ModuleDict({"coder": Coder(), "attention": nn.MultiheadAttention(8, 2), "conv": Conv1D(3, 2)})
    replace_linear_with_target_and_quantize(model, Foreign, None)
    assert isinstance(model["coder"].body, Foreign)
    assert isinstance(model["coder"].head, nn.Linear)
    assert isinstance(model["attention"].out_proj, nn.Linear)
    assert isinstance(model["conv"], Conv1D)


def test_no_float_copy_of_a_replaced_weight_is_left_alive():
    model = nn.ModuleDict(
        {
            "coder": Coder(),
            "attention": nn.MultiheadAttention(8, 2),
            "apart": nn.MultiheadAttention(8, 2, kdim=4),
            "conv": Conv1D(3, 2),
            "one": nn.Linear(3, 3),
        }
    )
    weights = {name: weakref.ref(p) for name, p in model.named_parameters() if p.dim() == 2}
    storages = {name: weakref.ref(p().untyped_storage()) for name, p in weights.items()}
    assert len(weights) == 10
    plan = quantize(model)
    assert plan
    assert [name for name, weight in weights.items() if weight() is not None] == []
    assert [name for name, storage in storages.items() if storage() is not None] == []


def shared(*layers):
    for layer in layers[1:]:
        layer.weight = layers[0].weight
    return nn.Sequential(*layers)


def test_convolutions_that_share_a_weight_share_codes_if_they_count_rows_alike():
    model = shared(nn.Conv1d(8, 8, 3), nn.Conv1d(8, 8, 3, dilation=2))
    assert decisions(model) == {"0": ("w8a32", "spec"), "1": ("w8a32", "spec")}
    quantize(model)
    assert model[0].int8_weights is model[1].int8_weights
    # a scale for each output channel is one for each input channel of its transpose
    turned = shared(nn.Conv1d(8, 8, 3), nn.ConvTranspose1d(8, 8, 3))
    assert decisions(nn.Sequential(turned, nn.Linear(8, 8))) == {
        "0.0": ("float", "tied to 0.1.weight"),
        "0.1": ("float", "tied to 0.0.weight"),
        "1": ("w8a32", "spec"),
    }


def test_a_recurrent_layer_that_shares_a_part_of_its_weights_stays_float():
    model = nn.Sequential(nn.LSTM(8, 8), nn.LSTM(8, 8), nn.LSTM(8, 8, 2))
    model[1].weight_ih_l0 = model[0].weight_ih_l0
    model[2].weight_hh_l1 = model[2].weight_hh_l0
    assert decisions(nn.Sequential(model, nn.Linear(8, 8))) == {
        "0.0": ("float", "tied to 0.1.weight_ih_l0"),
        "0.1": ("float", "tied to 0.0.weight_ih_l0"),
        "0.2": ("float", "tied to 0.2.weight_hh_l1"),
        "1": ("w8a32", "spec"),
    }
