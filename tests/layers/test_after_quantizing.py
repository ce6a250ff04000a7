"""What people do with a module once it is quantized: compile, export, copy, cast, train on top of it, restore it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lightnings import summarize
from mixed import RULE, Mixed
from models import FEATURES, keeper, trainer
from torch import nn
from transformer import Adapted, Language, MixedLanguage, loader, words

from tinyq_lightning import TinyQCallback, load_quantized, quantize
from tinyq_lightning.errors import CheckpointError, ModelError, ReadOnlyWeightError, SpecError
from tinyq_lightning.layers.int8_weight import Int8Weight
from tinyq_lightning.layers.linear import QuantizedLinear
from tinyq_lightning.layers.quantized_layer import QuantizedLayer


def quantized_language(method="w8a32", **kwargs):
    model = Language(**kwargs).eval()
    quantize(model, method)
    return model


def quantized_mixed(seed, method="w8a32"):
    torch.manual_seed(seed)
    model = Mixed().eval()
    quantize(model, {"method": method, "rules": [RULE]})
    return model, torch.randn(3, FEATURES)


def test_state_dicts_stand_in_for_the_weights_of_every_kind_for_a_while():
    (model, x), (other, _) = quantized_mixed(0), quantized_mixed(1)
    with torch.no_grad():
        own, wanted = model(x), other(x)
        for state, expected in ((model.state_dict(), own), (other.state_dict(), wanted)):
            got = torch.func.functional_call(model, state, (x,), tie_weights=False)  # as for float ties
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(model(x), own)
        assert model.words.int8_weights is model.out.int8_weights
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


def test_packed_codes_do_not_stand_in_and_say_what_does():
    (model, x), (other, _) = quantized_mixed(0, "w4a32"), quantized_mixed(1, "w4a32")
    with torch.no_grad():
        own, wanted = model(x), other(x)
        with pytest.raises(ModelError, match=r"packed in state dicts alone.*named_buffers"):
            torch.func.functional_call(model, other.state_dict(), (x,), tie_weights=False)
        assert torch.equal(model(x), own)
        for layer in (*model.modules(), *other.modules()):
            if isinstance(layer, Int8Weight):
                layer.unpack()
        tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
        got = torch.func.functional_call(model, tensors, (x,))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


class AllKinds(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.bag = nn.Embedding(9, 8), nn.EmbeddingBag(9, 8)
        self.linear, self.lstm, self.conv = nn.Linear(8, 8), nn.LSTM(8, 8), nn.Conv1d(8, 8, 3)
        self.table = nn.Parameter(torch.randn(9, 8))


def test_what_is_no_kernel_is_refused_by_each_layer():
    model = AllKinds()
    quantize(model, {"rules": [{"match": "table", "method": "w8a32"}]})
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLayer)]
    assert len(layers) == 6
    for layer in layers:
        with pytest.raises(SpecError, match="kernel 'fast': it must be one of auto, "):
            layer.kernel = "fast"
        layer.kernel = "reference"
        assert layer.kernel == "reference"


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("method", ["w8a32", "w8a16", "w8a8"])
def test_a_quantized_model_compiles_as_one_graph(method):
    model, x = quantized_language(method), words()
    with torch.no_grad():
        wanted = model(x)
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", ["w8a32", "w8a16", "w8a8"])
def test_a_quantized_model_compiles_with_inductor(method):
    model, x = quantized_language(method), words()
    with torch.no_grad():
        wanted = model(x)
        got = torch.compile(model, fullgraph=True)(x)
    torch.testing.assert_close(got, wanted, atol=2e-2, rtol=1e-2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", ["w8a32", "w8a16", "w8a8"])
def test_a_quantized_model_exports_with_a_batch_of_any_size(method):
    model = quantized_language(method)
    shapes = {"words": {0: torch.export.Dim("batch", min=2, max=64)}}
    with torch.no_grad():
        program = torch.export.export(model, (words(4),), dynamic_shapes=shapes, strict=False)
        x = words(7)
        torch.testing.assert_close(program.module()(x), model(x), atol=2e-2, rtol=1e-2)
    assert any(tensor.dtype == torch.int8 for tensor in program.state_dict.values())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_the_same_bits(copied):
    model, x = quantized_language(), words()
    assert torch.equal(copied(model)(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_change_activations_and_no_code(dtype):
    model, x = quantized_language(), words()
    codes = {name: value.clone() for name, value in model.state_dict().items() if "int8" in name or "scales" in name}
    wanted = model(x)
    got = model.to(dtype)(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), wanted, atol=0.1, rtol=0.1)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in codes.items())


def test_a_model_moves_to_another_device_and_back_to_memory():
    model = quantized_language().to("meta")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu").load_state_dict(quantized_language().state_dict())
    assert model.head.int8_weights is model.embed.int8_weights
    model(words())


def test_lightnings_own_summary_shows_the_layers_and_what_can_be_trained():
    model = quantized_language()
    model.example_input_array = words()
    summary = summarize(model, max_depth=-1)
    types = dict(zip(summary.layer_names, summary.layer_types, strict=True))
    assert types["embed"] == "QuantizedEmbedding"
    assert types["look.q_proj"] == types["encoder.layers.0.linear1"] == "W8A32LinearLayer"
    assert summary.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert "W8A32LinearLayer" in str(summary)


def test_third_party_reads_work_and_writes_are_refused():
    model, float_model = quantized_language(), Language()
    for name, module in model.named_modules():
        if isinstance(module, Int8Weight) and not name.startswith(("encoder.layers.0.self_attn", "look")):
            there = float_model.get_submodule(name)
            assert (module.weight.shape, module.weight.dtype, module.weight.device) == (
                there.weight.shape,
                there.weight.dtype,
                there.weight.device,
            )
            assert getattr(module, "in_features", 0) == getattr(there, "in_features", 0)
            assert getattr(module, "bias", None) is None or module.bias.shape == there.bias.shape
            with pytest.raises(ReadOnlyWeightError, match="read-only view"):
                module.weight = there.weight


@pytest.mark.parametrize("method", ["w8a32", "w8a8"])
def test_adapters_train_on_a_frozen_int8_base(method):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    quantize(base, method)
    base.requires_grad_(False)
    codes = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = nn.Sequential(Adapted(base[0]), base[1], Adapted(base[2]))
    x, target = torch.randn(64, 8), torch.randint(4, (64,))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 4
    optimizer, losses = torch.optim.Adam(trained, lr=0.05), []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(torch.equal(tensor, codes[name]) for name, tensor in base.state_dict().items())


def test_layers_made_under_inference_mode_can_be_trained_past():
    model = Language()
    with torch.inference_mode():
        quantize(model)
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    nn.functional.cross_entropy(model(words()).flatten(0, 1), words().flatten()).backward()
    assert model.encoder.layers[0].norm1.weight.grad is not None


def test_testing_under_inference_mode_leaves_no_inference_tensor_behind(tmp_path):
    model, callback = Language(), TinyQCallback("w8a8", when="test_start", report=False)
    run = trainer(tmp_path, callback, max_epochs=1)
    run.test(model, loader(), verbose=False)
    assert callback.plan is not None
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(tensor.is_inference() for tensor in tensors)
    assert model.head.weight is model.embed.weight
    assert type(model.look) is nn.MultiheadAttention
    trainer(tmp_path, max_epochs=1).fit(model, loader(), loader())


@pytest.fixture
def saved(tmp_path):
    model, callback = (
        Language(),
        TinyQCallback(
            {"method": "w8a32", "rules": [{"match": "k_proj", "method": "w8a8"}], "exclude": ["v_proj"]}, report=False
        ),
    )
    run = trainer(tmp_path, keeper(tmp_path), callback, max_epochs=1)
    run.fit(model, loader(), loader())
    quantize(model := Language.load_from_checkpoint(callback.float_path).eval(), callback.plan.to_spec())
    return callback, model


def test_a_file_restores_attention_and_ties_bit_by_bit(saved):
    callback, wanted = saved
    content = torch.load(callback.quantized_path, weights_only=True)["state_dict"]
    assert content["head.int8_weights"].data_ptr() == content["embed.int8_weights"].data_ptr()
    x = words()
    for loaded in (
        load_quantized(callback.quantized_path, Language),
        MixedLanguage.load_from_checkpoint(callback.quantized_path).eval(),
    ):
        assert loaded.head.int8_weights is loaded.embed.int8_weights
        assert isinstance(loaded.look.q_proj, QuantizedLinear)
        assert type(loaded.look.v_proj) is nn.Linear
        assert loaded.encoder.layers[0].activation_relu_or_gelu == 0
        state = loaded.state_dict()
        assert list(state) == list(wanted.state_dict())
        assert all(torch.equal(tensor, state[name]) for name, tensor in wanted.state_dict().items())
        with torch.no_grad():
            assert torch.equal(loaded(x), wanted(x))


def test_a_class_that_ties_later_gets_its_tie_from_the_file(saved):
    callback, wanted = saved
    loaded = load_quantized(callback.quantized_path, Language, tied=False)
    assert loaded.head.int8_weights is loaded.embed.int8_weights
    assert torch.equal(loaded.embed.int8_weights, wanted.embed.int8_weights)


def test_a_file_of_another_size_is_refused_by_layer(saved):
    with pytest.raises(CheckpointError, match=r"layer 'embed' is \[20, 16\].*\[20, 32\]"):
        load_quantized(saved[0].quantized_path, Language, size=32)


def test_a_trainer_tests_the_file_and_the_module_is_float_again_with_its_weights(saved, tmp_path):
    callback, wanted = saved
    model, data = Language(), loader()
    run = trainer(tmp_path, TinyQCallback("w8a32", report=False), max_epochs=1)
    (got,) = run.test(model, data, ckpt_path=callback.quantized_path, verbose=False)
    (reference,) = trainer(tmp_path, max_epochs=1).test(wanted, data, verbose=False)
    assert got["test_loss"] == reference["test_loss"]
    assert type(model.look) is nn.MultiheadAttention
    assert model.head.weight is model.embed.weight
    assert model.encoder.layers[0].activation_relu_or_gelu == 1
    assert torch.equal(model.embed.weight, wanted.embed.weight)
    assert torch.equal(model.look.q_proj_weight, wanted.look.q_proj_weight)
    assert torch.equal(model.look.in_proj_bias, wanted.look.in_proj_bias)
    assert torch.equal(
        model.encoder.layers[0].self_attn.in_proj_weight, wanted.encoder.layers[0].self_attn.in_proj_weight
    )
