"""Multi-head attention with int8 projections gives what the float module gives, and never its float weights."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from tinyq_lightning import quantize, quantized
from tinyq_lightning.errors import ModelError
from tinyq_lightning.layers.attention import QuantizedMultiheadAttention
from tinyq_lightning.layers.linear import QuantizedLinear

BATCH, LENGTH, KEYS, EMBED, HEADS = 3, 4, 6, 16, 2


def error(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


def attention(**kwargs):
    module = nn.MultiheadAttention(EMBED, HEADS, **kwargs)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


class Operators(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


FUSED = {"aten::_transformer_encoder_layer_fwd", "aten::_native_multi_head_attention"}


# With the float weights set to what the codes stand for, the int8 module must agree to float rounding.
def pair(**kwargs):
    module = attention(**kwargs)
    holder = nn.ModuleDict({"attention": module})
    with quantized(holder, "w8a32"):
        opened = holder["attention"]
        layers = {name: layer for name, layer in opened.named_modules() if isinstance(layer, QuantizedLinear)}
    with torch.no_grad():
        for name, layer in layers.items():
            weight = module.out_proj.weight if name == "out_proj" else getattr(module, f"{name}_weight")
            weight.copy_(layer.dequantize())
    return module, opened


def masks(mask, padding, batch):
    attn_mask = {
        "none": None,
        "2d": torch.rand(LENGTH, KEYS) > 0.7,
        "float": torch.randn(LENGTH, KEYS),
        "heads": torch.rand(batch * HEADS, LENGTH, KEYS) > 0.7,
    }[mask]
    key_padding_mask = {"none": None, "bool": torch.rand(batch, KEYS) > 0.7, "float": torch.randn(batch, KEYS)}[padding]
    for each in (attn_mask, key_padding_mask):
        if each is not None and each.dtype == torch.bool:
            each[..., 0] = False
    return attn_mask, key_padding_mask


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask is deprecated")
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"kdim": 5, "vdim": 7},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"bias": False},
        {"batch_first": True},
        {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True, "kdim": 5},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "plain",
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_outputs_and_weights_are_those_of_the_float_module(kwargs, training):
    module, opened = pair(**kwargs)
    module.train(training)
    opened.train(training)
    sizes = (EMBED, kwargs.get("kdim", EMBED), kwargs.get("vdim", EMBED))
    for batched, mask, padding, average, need in itertools.product(
        (True, False), ("none", "2d", "float", "heads"), ("none", "bool", "float"), (True, False), (True, False)
    ):
        batch = BATCH if batched else 1
        inputs = [torch.randn(batch, length, size) for length, size in zip((LENGTH, KEYS, KEYS), sizes, strict=True)]
        if sizes[1] == sizes[2]:
            inputs[2] = inputs[1]
        attn_mask, key_padding_mask = masks(mask, padding, batch)
        if not batched:
            inputs, key_padding_mask = [x[0] for x in inputs], None if key_padding_mask is None else key_padding_mask[0]
        elif not kwargs.get("batch_first"):
            inputs = [x.transpose(0, 1) for x in inputs]
        given = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask, "need_weights": need}
        wanted, weights = module(*inputs, **given, average_attn_weights=average)
        got, got_weights = opened(*inputs, **given, average_attn_weights=average)
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
        assert (got_weights is None) == (weights is None)
        if weights is not None:
            torch.testing.assert_close(got_weights, weights, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("need_weights", [True, False])
def test_self_attention_in_eval_gives_what_the_fused_path_gives(mode, need_weights):
    module, opened = (each.eval() for each in pair(batch_first=True))
    x = torch.randn(BATCH, LENGTH, EMBED)
    padding = torch.arange(LENGTH) >= torch.tensor([[4], [2], [1]])
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    with mode():
        for given in (
            {},
            {"key_padding_mask": padding},
            {"attn_mask": causal},
            {"attn_mask": causal, "is_causal": True},
        ):
            wanted, _ = module(x, x, x, need_weights=need_weights, **given)
            with Operators() as ran:
                got, _ = opened(x, x, x, need_weights=need_weights, **given)
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
            assert not ran.names & FUSED


def test_dropout_is_of_the_attention_weights_and_in_training_only():
    _, opened = pair(dropout=0.5)
    x = torch.randn(LENGTH, BATCH, EMBED)
    _, weights = opened.train()(x, x, x, average_attn_weights=False)
    assert (weights == 0).float().mean() > 0.2
    _, weights = opened.eval()(x, x, x, average_attn_weights=False)
    assert (weights > 0).all()


@pytest.mark.parametrize("method", ["w8a32", "w8a16", "w8a8"])
def test_gradients_reach_the_inputs(method):
    module = nn.ModuleDict({"attention": attention()})
    x = torch.randn(LENGTH, BATCH, EMBED, requires_grad=True)
    (wanted,) = torch.autograd.grad(module["attention"](x, x, x)[0].square().sum(), x)
    quantize(module, method)
    (got,) = torch.autograd.grad(module["attention"](x, x, x)[0].square().sum(), x)
    assert error(got, wanted) < 0.05


def test_shapes_that_do_not_fit_are_refused_by_name():
    _, opened = pair()
    x, y = torch.randn(LENGTH, BATCH, EMBED), torch.randn(KEYS, BATCH, EMBED)
    with pytest.raises(ModelError, match=r"2 or of 3 dimensions.*\[4, 3, 16\], \[3, 16\]"):
        opened(x, x[0], x[0])
    with pytest.raises(ModelError, match=r"attn_mask must be \[4, 6\] or \[6, 4, 6\], got \[4, 4\]"):
        opened(x, y, y, attn_mask=torch.zeros(4, 4))
    with pytest.raises(ModelError, match=r"key_padding_mask must be \[3, 6\], got \[3, 4\]"):
        opened(x, y, y, key_padding_mask=torch.zeros(3, 4))
    with pytest.raises(ModelError, match=r"boolean or floating point, this one is torch\.int64"):
        opened(x, y, y, attn_mask=torch.zeros(4, 6, dtype=torch.long))
    with pytest.raises(ModelError, match="is_causal is a hint"):
        opened(x, x, x, is_causal=True)


def test_the_plan_lists_each_projection_and_patterns_decide_on_each():
    model = nn.ModuleDict({"joint": attention(), "apart": attention(kdim=8, vdim=8)})
    plan = quantize(
        model,
        {
            "method": "w8a32",
            "exclude": ["joint.out_proj"],
            "rules": [{"match": "apart.v_proj", "method": "w8a8"}, {"match": "q_proj", "method": "float"}],
        },
    )
    assert {d.name: (d.method, d.reason) for d in plan} == {
        "joint.in_proj": ("w8a32", "spec"),
        "joint.out_proj": ("float", "excluded"),
        "apart.q_proj": ("float", "rule 2"),
        "apart.k_proj": ("w8a32", "spec"),
        "apart.v_proj": ("w8a8", "rule 1"),
        "apart.out_proj": ("w8a32", "spec"),
    }
    assert set(model.state_dict()) >= {
        "joint.in_proj.int8_weights",
        "joint.in_proj.scales",
        "joint.in_proj.bias",
        "joint.out_proj.weight",
        "apart.q_proj.weight",
        "apart.v_proj.int8_weights",
    }
    x, y = torch.randn(LENGTH, BATCH, EMBED), torch.randn(KEYS, BATCH, 8)
    model["joint"](x, x, x), model["joint"](x, x.clone(), x), model["apart"](x, y, y)


def test_an_attention_of_which_nothing_is_quantized_is_the_same_object_with_the_same_keys():
    model = nn.ModuleDict({"attention": attention(), "head": nn.Linear(EMBED, 2)})
    before, keys = model["attention"], list(model["attention"].state_dict())
    quantize(model, {"method": "w8a32", "exclude": ["attention"]})
    assert model["attention"] is before
    assert list(model["attention"].state_dict()) == keys


def test_no_float_matrix_is_copied_and_swapping_back_gives_the_same_objects():
    model = nn.ModuleDict({"attention": attention(kdim=8)})
    before = model["attention"]
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    handle = before.register_forward_hook(lambda *args: None)
    with quantized(model, {"method": "w8a32", "exclude": ["v_proj"]}):
        assert isinstance(model["attention"], QuantizedMultiheadAttention)
        assert model["attention"].v_proj.weight is before.v_proj_weight
        assert handle.id in model["attention"]._forward_hooks
    assert dict(model.named_modules()) == modules
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    handle.remove()
    assert not model["attention"]._forward_hooks


def test_attributes_that_others_read_are_those_of_the_float_module():
    for kwargs in ({}, {"kdim": 8, "vdim": 9}, {"bias": False}, {"bias": False, "kdim": 8}):
        module, opened = pair(**kwargs)
        assert isinstance(opened, nn.MultiheadAttention)
        for name in ("embed_dim", "num_heads", "head_dim", "batch_first", "_qkv_same_embed_dim", "kdim", "dropout"):
            assert getattr(opened, name) == getattr(module, name)
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k"):
            wanted, got = getattr(module, name), getattr(opened, name)
            assert (got is None) == (wanted is None), name
            if wanted is not None:
                torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(opened.out_proj.weight, module.out_proj.weight)


class OwnForward(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)


class Adds(nn.MultiheadAttention):
    def gate(self):
        return 1


class OnlyBuildsOtherwise(nn.MultiheadAttention):
    def __init__(self):
        super().__init__(EMBED, HEADS)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (OwnForward(EMBED, HEADS), "OwnForward has a forward of its own"),
        (Adds(EMBED, HEADS), "Adds adds gate to nn.MultiheadAttention"),
        (parametrizations.weight_norm(attention(), "in_proj_weight"), "it holds parametrizations besides"),
        (OnlyBuildsOtherwise(), "spec"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_subclass_is_quantized_or_stays_float_with_the_reason(module, reason):
    model = nn.ModuleDict({"attention": module, "head": nn.Linear(EMBED, 2)})
    plan = {d.name: d for d in quantize(model)}
    assert set(plan) == {"attention.in_proj", "attention.out_proj", "head"}
    for part in ("in_proj", "out_proj"):
        assert plan[f"attention.{part}"].reason.startswith(reason)
    assert (model["attention"] is module) == (reason != "spec")


def encoder(layers=2, **kwargs):
    kwargs = {"batch_first": True, "dim_feedforward": 32, **kwargs}
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, **kwargs)
    return nn.TransformerEncoder(
        layer, layers, enable_nested_tensor=kwargs["batch_first"] and not kwargs.get("norm_first")
    )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"norm_first": True}, {"activation": "gelu"}, {"batch_first": False}],
    ids=lambda kwargs: "-".join(kwargs) or "plain",
)
def test_an_encoder_in_eval_has_no_float_matrix_and_takes_no_fused_path(mode, kwargs):
    model = encoder(**kwargs).eval()
    x = (
        torch.randn(BATCH, LENGTH, EMBED)
        if model.layers[0].self_attn.batch_first
        else torch.randn(LENGTH, BATCH, EMBED)
    )
    padding = torch.arange(LENGTH) >= torch.tensor([[4], [2], [1]])
    with mode():
        wanted, wanted_padded = model(x), model(x, src_key_padding_mask=padding)
    quantize(model, "w8a32")
    assert not [name for name, tensor in model.state_dict().items() if tensor.dim() == 2 and tensor.is_floating_point()]
    with mode(), Operators() as ran:
        got, got_padded = model(x), model(x, src_key_padding_mask=padding)
    assert not ran.names & FUSED
    assert error(got, wanted) < 0.02
    # where it uses nested tensors, torch's encoder gives zeros for what is padded, and so it must stay
    assert torch.equal(got_padded == 0, wanted_padded == 0)
    assert error(got_padded, wanted_padded) < 0.02


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors_give_what_their_sequences_give_alone():
    model = encoder().eval()
    quantize(model, {"method": "w8a32", "kernel": "int8"})
    parts = [torch.randn(length, EMBED) for length in (3, 5, 1)]
    with torch.no_grad():
        together = model.layers[0](torch.nested.nested_tensor(parts)).unbind()
        for part, got in zip(parts, together, strict=True):
            torch.testing.assert_close(got, model.layers[0](part[None])[0])
        nested = torch.nested.nested_tensor(parts)
        with pytest.raises(ModelError, match="without masks"):
            model.layers[0].self_attn(nested, nested, nested)


@pytest.mark.parametrize("excluded", ["self_attn", "linear1", "linear2", "out_proj"])
def test_a_partly_float_encoder_layer_takes_no_fused_path_either(excluded):
    model = encoder().eval()
    x = torch.randn(BATCH, LENGTH, EMBED)
    with torch.no_grad():
        wanted = model(x)
        with quantized(model, {"method": "w8a32", "exclude": [f"*.{excluded}"]}), Operators() as ran:
            got = model(x)
        assert "aten::_transformer_encoder_layer_fwd" not in ran.names
        assert error(got, wanted) < 0.02
        with Operators() as ran:
            assert torch.equal(model(x), wanted)
        assert ran.names & FUSED  # the user's model is as fast as it was


@pytest.mark.parametrize("training", [True, False])
def test_decoder_and_transformer_run_with_masks(training):
    model = nn.Transformer(EMBED, HEADS, 1, 1, 32, dropout=0.0, batch_first=True).train(training)
    source, target = torch.randn(BATCH, KEYS, EMBED), torch.randn(BATCH, LENGTH, EMBED)
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    given = {"tgt_mask": causal, "tgt_is_causal": True, "memory_key_padding_mask": torch.zeros(BATCH, KEYS).bool()}
    with torch.set_grad_enabled(training):
        wanted = model(source, target, **given)
        plan = quantize(model, "w8a8")
        got = model(source, target, **given)
    assert {d.name for d in plan} >= {"decoder.layers.0.multihead_attn.in_proj", "decoder.layers.0.self_attn.out_proj"}
    assert error(got, wanted) < 0.05


@pytest.mark.parametrize("excluded", ["*.in_proj", "*.out_proj"])
def test_a_second_call_lists_the_projections_and_quantizes_what_was_left(excluded):
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, 0, batch_first=True)).eval()
    expected = copy.deepcopy(model)
    names = [decision.name for decision in quantize(expected)]
    quantize(model, {"exclude": [excluded]})
    again = quantize(model)
    assert [decision.name for decision in again] == names
    assert sorted(decision.reason for decision in again) == ["already quantized"] * 3 + ["spec"]
    x = torch.randn(2, 3, 16)
    assert torch.equal(model(x), expected(x))
    assert model.state_dict().keys() == expected.state_dict().keys()


def test_added_keys_are_in_a_graph_of_any_batch():
    net = nn.Sequential(nn.MultiheadAttention(16, 4, add_bias_kv=True, add_zero_attn=True, batch_first=True)).eval()
    quantize(net, "w8a32")
    attention, x = net[0], torch.randn(4, 5, 16)
    batch = torch.export.Dim("batch")
    sizes = {name: {0: batch} for name in ("query", "key", "value")}
    program = torch.export.export(attention, (x, x, x), dynamic_shapes=sizes, strict=False).module()
    torch.testing.assert_close(program(x[:3], x[:3], x[:3])[0], attention(x[:3], x[:3], x[:3])[0])


def test_a_pickle_that_names_the_former_module_of_attention_loads():
    model = nn.ModuleList([nn.MultiheadAttention(8, 2)])
    quantize(model, "w8a32")
    former = b"tinyq_lightning.attention"
    text = pickle.dumps(model[0], protocol=0).replace(b"tinyq_lightning.layers.attention", former)
    assert former in text
    assert type(pickle.loads(text)) is QuantizedMultiheadAttention


def test_a_call_with_tensors_without_values_leaves_nothing_behind():
    attention = nn.Sequential(nn.MultiheadAttention(16, 2, batch_first=True)).eval()
    quantize(attention)
    x, y = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    wanted = copy.deepcopy(attention[0])(x, y, y)[0]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        attention[0](mode.from_tensor(x), mode.from_tensor(y), mode.from_tensor(y))
    torch.testing.assert_close(attention[0](x, y, y)[0], wanted)
