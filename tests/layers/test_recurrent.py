"""Recurrent layers: torch's own results for the dequantized weights, bit for bit, whatever the settings."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from tinyq_lightning.errors import ModelError, ReadOnlyWeightError, SpecError
from tinyq_lightning.kernels.weights import dequantize, quantize_per_row
from tinyq_lightning.layers.recurrent import RECURRENT, QuantizedLSTM

IN, HIDDEN = 6, 10
SEQUENCES = (nn.RNN, nn.LSTM, nn.GRU)
CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
# torch says so of a single layer with dropout, and of each LSTM with projections
pytestmark = pytest.mark.filterwarnings("ignore:dropout option adds", "ignore:LSTM with projections is not supported")


def twins(kind, *args, **kwargs):
    """A quantized layer, and torch's own layer with its dequantized weights, which are not trained, and its biases."""
    torch.manual_seed(0)
    layer = kind(*(args or (IN, HIDDEN)), **kwargs)
    quantized = RECURRENT[kind].from_float(copy.deepcopy(layer))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(getattr(quantized, name))
            parameter.requires_grad_(
                name.startswith("bias")
            )  # torch sums in another order for weights that are trained
    return quantized, layer


def tensors(output):
    """All tensors of an output, in order."""
    if isinstance(output, PackedSequence):
        return [each for each in output if each is not None]
    if isinstance(output, torch.Tensor):
        return [output]
    return [tensor for each in output for tensor in tensors(each)]


def assert_same(quantized, layer, *args):
    """The same bits out of both, from the same random state."""
    torch.manual_seed(1)
    mine = tensors(quantized(*args))
    torch.manual_seed(1)
    theirs = tensors(layer(*args))
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def settings():
    """Arguments of torch's sequence layers: all of each alone, and all pairs of layers, directions and projections."""
    for kind, layers, both, bias, first in product(SEQUENCES, (1, 3), (False, True), (False, True), (False, True)):
        yield kind, {"num_layers": layers, "bidirectional": both, "bias": bias, "batch_first": first}
    for layers, both, bias in product((1, 2), (False, True), (False, True)):
        yield nn.LSTM, {"num_layers": layers, "bidirectional": both, "bias": bias, "proj_size": 4}
    for kind in SEQUENCES:
        yield kind, {"num_layers": 2, "dropout": 0.5}
        yield kind, {"num_layers": 2, "dropout": 0.5, "bidirectional": True, "batch_first": True}
    yield nn.RNN, {"nonlinearity": "relu", "num_layers": 2}


def state(layer, batch):
    """A hidden state for a batch; without a batch dimension if ``batch`` is None."""
    lead = (layer.num_layers * (2 if layer.bidirectional else 1),) + (() if batch is None else (batch,))
    h = torch.randn(*lead, layer.proj_size or layer.hidden_size)
    return (h, torch.randn(*lead, layer.hidden_size)) if isinstance(layer, nn.LSTM) else h


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("kind", "kwargs"), list(settings()), ids=lambda value: str(getattr(value, "__name__", value)))
def test_outputs_are_torchs_own_for_the_dequantized_weights(kind, kwargs, training):
    quantized, layer = twins(kind, **kwargs)
    quantized.train(training)
    layer.train(training)
    x = torch.randn(5, 3, IN)
    batch = len(x) if layer.batch_first else x.shape[1]
    assert_same(quantized, layer, x)
    assert_same(quantized, layer, x, state(layer, batch))
    assert_same(quantized, layer, x[0])
    assert_same(quantized, layer, x[0], state(layer, None))
    for lengths, ordered in (([5, 4, 2], True), ([2, 5, 4], False)):
        packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=ordered)
        assert_same(quantized, layer, packed)
        assert_same(quantized, layer, packed, state(layer, 3))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kind", "kwargs"), [*((kind, {}) for kind in CELLS), (nn.RNNCell, {"nonlinearity": "relu"})], ids=str
)
def test_cells_are_torchs_own_for_the_dequantized_weights(kind, kwargs, bias):
    quantized, layer = twins(kind, bias=bias, **kwargs)
    h = torch.randn(4, HIDDEN)
    hidden = (h, torch.randn(4, HIDDEN)) if kind is nn.LSTMCell else h
    x = torch.randn(4, IN)
    assert_same(quantized, layer, x)
    assert_same(quantized, layer, x, hidden)
    assert_same(quantized, layer, x[0], (hidden[0][0], hidden[1][0]) if kind is nn.LSTMCell else h[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [*SEQUENCES, *CELLS], ids=lambda kind: kind.__name__)
def test_every_dtype_and_casts_there_and_back(kind, dtype):
    quantized, layer = twins(kind, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in quantized.named_buffers()}
    x = torch.randn(4, IN, dtype=dtype)
    assert_same(quantized.eval(), layer.eval(), x)
    quantized.float().to(torch.bfloat16).type(dtype)
    for name, tensor in quantized.named_buffers():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    assert quantized.dtype == dtype
    if dtype != torch.float64:  # whose biases bfloat16 has rounded
        quantized, layer = twins(kind, dtype=torch.float32)
        assert_same(quantized.to(dtype).eval(), twins(kind, dtype=torch.float32)[0].to(dtype).eval(), x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [*SEQUENCES, *CELLS], ids=lambda kind: kind.__name__)
def test_autocast_gives_the_same_bits_and_gradients(kind, training):
    quantized, layer = twins(kind)
    quantized.train(training)
    layer.train(training)
    x = torch.randn(4, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        try:
            layer(x)
        except RuntimeError as error:
            pytest.skip(f"torch itself cannot: {error}")
        assert_same(quantized, layer, x)
        gradients = [torch.autograd.grad(tensors(each(x))[0].float().sum(), x)[0] for each in (quantized, layer)]
    assert torch.equal(*gradients)
    assert_same(quantized, layer, x)


@pytest.mark.parametrize("kind", SEQUENCES, ids=lambda kind: kind.__name__)
def test_gradients_reach_input_hidden_state_and_biases(kind):
    quantized, layer = twins(kind, num_layers=2, bidirectional=True)
    x, h = torch.randn(5, 3, IN), state(layer, 3)
    found = []
    for each in (quantized, layer):
        given = [tensor.clone().requires_grad_() for tensor in (x, *(h if isinstance(h, tuple) else (h,)))]
        for tensor in tensors(each(given[0], tuple(given[1:]) if isinstance(h, tuple) else given[1])):
            tensor.square().sum().backward(retain_graph=True)
        biases = [p.grad for name, p in each.named_parameters() if name.startswith("bias")]
        found.append([*(tensor.grad for tensor in given), *biases])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert all(not tensor.requires_grad for tensor in quantized.buffers())


def test_the_state_dict_has_codes_and_scales_by_the_name_of_each_weight():
    layer = nn.LSTM(IN, HIDDEN, 2, proj_size=4)
    quantized = QuantizedLSTM.from_float(layer)
    saved, floats = quantized.state_dict(), layer.state_dict()
    weights = {name for name in floats if name.startswith("weight")}
    assert saved.keys() == {f"{name}.{part}" for name in weights for part in ("int8_weights", "scales")} | (
        floats.keys() - weights
    )
    for name in weights:
        codes, scales = quantize_per_row(floats[name])
        assert torch.equal(saved[f"{name}.int8_weights"], codes)
        assert torch.equal(saved[f"{name}.scales"], scales)
        assert (saved[f"{name}.int8_weights"].dtype, saved[f"{name}.scales"].dtype) == (torch.int8, torch.float32)
    for name in floats.keys() - weights:
        assert torch.equal(saved[name], floats[name])
        assert getattr(quantized, name) is getattr(layer, name)


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("kind", [*SEQUENCES, *CELLS], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("bias", [True, False])
def test_state_dicts_load_and_copies_are_bit_equal(kind, bias, assign):
    quantized, _ = twins(kind, bias=bias)
    x = torch.randn(4, IN)
    quantized.eval()(x)
    file = io.BytesIO()
    torch.save(quantized.state_dict(), file)
    file.seek(0)
    empty = RECURRENT[kind](kind(IN, HIDDEN, bias=bias, device="meta" if assign else None)).eval()
    model = nn.Sequential(empty)
    saved = {f"0.{name}": tensor for name, tensor in torch.load(file, weights_only=True).items()}
    model.load_state_dict(saved, assign=assign)
    for other in (empty, copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert_same(quantized, other, x)
        assert not other.training
        assert other.state_dict().keys() == quantized.state_dict().keys()
        for name, tensor in other.state_dict().items():
            assert torch.equal(tensor, quantized.state_dict()[name])
    copied = copy.deepcopy(quantized)
    next(copied.buffers()).zero_()
    assert next(quantized.buffers()).any()


def test_a_state_dict_that_does_not_fit_is_refused_by_the_names_in_it():
    quantized, _ = twins(nn.GRU)
    state = quantized.state_dict()
    del state["weight_hh_l0.scales"]
    state["weight_ih_l0.int8_weights"] = torch.zeros(2, 2, dtype=torch.int8)
    state["weight_ih_l1.scales"] = torch.ones(2)
    with pytest.raises(RuntimeError) as caught:
        nn.Sequential(quantized).load_state_dict({f"0.{name}": tensor for name, tensor in state.items()})
    assert 'Missing key(s) in state_dict: "0.weight_hh_l0.scales"' in str(caught.value)
    assert 'Unexpected key(s) in state_dict: "0.weight_ih_l1.scales"' in str(caught.value)
    assert "size mismatch for 0.weight_ih_l0.int8_weights" in str(caught.value)


def test_new_codes_are_taken_on_the_next_call():
    quantized, layer = twins(nn.LSTM)
    x = torch.randn(5, 3, IN)
    quantized(x)
    quantized.codes_of("weight_hh_l0")[1].mul_(2)
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
    assert_same(quantized, layer, x)
    other, layer = twins(nn.LSTM)
    quantized.load_state_dict(other.state_dict())
    assert_same(quantized, layer, x)
    weight = torch.randn(4 * HIDDEN, IN)
    quantized.quantize({"weight_ih_l0": weight})
    with torch.no_grad():
        layer.weight_ih_l0.copy_(dequantize(*quantize_per_row(weight)))
    assert_same(quantized, layer, x)
    layer.bias_hh_l0 = quantized.bias_hh_l0 = nn.Parameter(torch.randn(4 * HIDDEN))
    assert_same(quantized, layer, x)


def test_weights_can_be_read_as_from_the_float_layer_and_not_written():
    quantized, layer = twins(nn.LSTM, num_layers=2, bidirectional=True)
    assert isinstance(quantized, nn.LSTM)
    for mine, theirs in zip(quantized.all_weights, layer.all_weights, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert torch.equal(one, other)
    assert all(torch.equal(*pair) for pair in zip(quantized._flat_weights, layer._flat_weights, strict=True))
    assert not quantized.weight_ih_l0.requires_grad
    assert not [name for name, _ in quantized.named_parameters() if "weight" in name]
    quantized.flatten_parameters()
    for change in (
        lambda: nn.init.orthogonal_(quantized.weight_hh_l0),
        lambda: quantized.weight_hh_l0.data.zero_(),
        lambda: setattr(quantized, "weight_hh_l0", nn.Parameter(torch.zeros(1))),
        lambda: quantized.reset_parameters(),
    ):
        with pytest.raises(ReadOnlyWeightError):
            change()
    assert not hasattr(quantized, "weight"), "torch's layer has none either"
    with pytest.raises(AttributeError, match="weight_ih_l2"):
        _ = quantized.weight_ih_l2
    with pytest.raises(ModelError, match="no weight 'weight'"):
        quantized.quantize({"weight": torch.zeros(1, 1)})
    with pytest.raises(ModelError, match=r"weight_hh_l1 .* takes a weight of shape \[40, 10\], got \[1, 1\]"):
        quantized.quantize({"weight_hh_l1": torch.zeros(1, 1)})


@pytest.mark.parametrize("kernel", ["auto", "int8", "reference"])
def test_a_float_copy_is_kept_unless_the_kernel_is_another(kernel, monkeypatch):
    monkeypatch.delenv("TINYQ_KERNEL", raising=False)
    quantized, layer = twins(nn.LSTM)
    quantized.kernel = kernel
    x = torch.randn(5, 3, IN)
    assert_same(quantized, layer, x)
    assert (quantized._copies is not None) == (kernel == "auto")
    assert quantized.choice.kernel == ("float32" if kernel == "auto" else "reference")
    assert ("float copy" if kernel == "auto" else "on each call") in quantized.choice.reason
    assert (f"kernel={kernel}" in repr(quantized)) == (kernel != "auto")
    quantized.kernel = "int8"
    assert quantized._copies is None
    with pytest.raises(SpecError, match="kernel 'fast'"):
        quantized.kernel = "fast"


def test_threads_may_make_the_first_call_at_the_same_time():
    quantized, layer = twins(nn.LSTM, IN, 64)
    x = torch.randn(5, 3, IN)
    wanted, found = layer(x)[0], []
    threads = [threading.Thread(target=lambda: found.append(quantized(x)[0])) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(found) == 8
    assert all(torch.equal(each, wanted) for each in found)


def test_settings_may_be_changed_after_quantizing():
    quantized, layer = twins(nn.LSTM, num_layers=2, dropout=0.5)
    x = torch.randn(5, 3, IN)
    quantized.dropout = layer.dropout = 0.0
    quantized.batch_first = layer.batch_first = True
    assert_same(quantized, layer, x)


def test_wrong_inputs_raise_torchs_own_errors():
    quantized, layer = twins(nn.LSTM)
    for x in (torch.randn(5, 3, IN + 1), torch.randn(IN), torch.randn(5, 3, IN, dtype=torch.float64)):
        errors = []
        for each in (quantized, layer):
            with pytest.raises((RuntimeError, ValueError)) as caught:
                each(x)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]


def test_inference_mode_leaves_nothing_behind_that_cannot_be_trained_past():
    quantized, layer = twins(nn.LSTM)
    x = torch.randn(5, 3, IN)
    with torch.inference_mode():
        quantized(x)
    x.requires_grad_()
    gradients = [torch.autograd.grad(each(x)[0].sum(), x)[0] for each in (quantized, layer)]
    assert torch.equal(*gradients)
