"""Look-ups in int8 rows: the float layer's results for the dequantized weight, bit by bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import fx, nn

from tinyq_lightning import quantize, quantized
from tinyq_lightning.kernels import has_fbgemm_rows, lookup
from tinyq_lightning.layers import QuantizedEmbedding, QuantizedEmbeddingBag

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(params=["packed", "copied", "rows"])
def table(request, monkeypatch):
    """Each way to look rows up: in packed rows, in a float copy, and in the codes."""
    if request.param == "packed" and not has_fbgemm_rows():
        pytest.skip("no packed rows on this processor")
    monkeypatch.setattr(lookup, "has_fbgemm_rows", lambda: request.param == "packed")
    monkeypatch.setattr(lookup, "_COPIED_TO", 2**18 if request.param == "copied" else 0)


@pytest.fixture
def unpacked(monkeypatch):
    """No packed rows, as on a processor without them."""
    monkeypatch.setattr(lookup, "has_fbgemm_rows", lambda: False)


def put_beside(layer):
    """The float layer with the dequantized weight, and the quantized one."""
    model = nn.Sequential(copy.deepcopy(layer))
    plan = quantize(model)
    assert [decision.method for decision in plan] == ["w8a32"], plan
    with torch.no_grad():
        layer.weight.copy_(model[0].weight)
    return layer, model[0]


class Scaled(nn.Embedding):
    """As Gemma has it."""

    def __init__(self, persistent):
        super().__init__(10, 8)
        self.register_buffer("factor", torch.tensor(3.0), persistent=persistent)

    def forward(self, input):
        return super().forward(input) * self.factor


def tied(persistent):
    model = nn.Sequential(Scaled(persistent), nn.Linear(8, 10, bias=False))
    model[1].weight = model[0].weight
    return model


def test_a_traced_look_up_is_scaled_once():
    model, words = tied(persistent=False), torch.arange(10)
    wanted = model[0](words)
    quantize(model)
    assert isinstance(model[0], QuantizedEmbedding)
    assert torch.allclose(model[0](words), wanted, atol=0.05)
    assert torch.equal(fx.symbolic_trace(model)(words), model(words))


def test_a_factor_that_a_file_may_change_keeps_the_layers_float():
    with quantized(tied(persistent=True), "w8a32") as plan:
        assert [decision.method for decision in plan] == ["float", "float"]
        assert plan.decisions[0].reason == "it holds factor besides its weight"


# nn.Embedding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"sparse": True}, {"scale_grad_by_freq": True}])
def test_a_look_up_gives_the_rows_of_the_dequantized_weight(table, dtype, options):
    layer, ours = put_beside(nn.Embedding(20, 12, dtype=dtype, **options))
    assert isinstance(ours, nn.Embedding)
    for input in (torch.tensor([[0, 3, 3], [19, 1, 7]]), torch.tensor(5), torch.tensor([], dtype=torch.long)):
        got = ours(input)
        assert got.dtype == dtype
        assert torch.equal(got, layer(input))
        assert torch.equal(ours(input.int()), got)
    for name in ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "sparse"):
        assert getattr(ours, name) == getattr(layer, name)


def test_an_index_beyond_the_table_is_an_error_as_in_the_float_layer(table):
    with pytest.raises(IndexError):
        put_beside(nn.Embedding(20, 12))[1](torch.tensor([20]))


def test_a_default_device_is_not_where_bags_are(table):
    _, ours = put_beside(nn.EmbeddingBag(10, 16, mode="sum"))
    input = torch.randint(10, (4, 3))
    wanted = ours(input)
    with torch.device("meta"):
        assert torch.equal(ours(input), wanted)


@pytest.mark.parametrize("layer", [nn.Embedding(9, 8, max_norm=1.0), nn.EmbeddingBag(9, 8, max_norm=1.0)])
def test_max_norm_stays_float_with_the_reason(layer):
    with quantized(nn.Sequential(layer, nn.Linear(8, 8)), "w8a32") as plan:
        assert plan.decisions[0].reason == "max_norm rewrites its rows"


def test_what_a_row_gains_nothing_by_stays_float():
    with quantized(nn.Sequential(nn.Embedding(9, 1), nn.Linear(8, 8)), "w8a32") as plan:
        assert plan.decisions[0].reason == "int8 is no smaller: 1 + 4 bytes a row, 4 as float"


# nn.EmbeddingBag


def calls(mode):
    flat, bags = torch.tensor([1, 2, 4, 5, 4, 3, 2, 9]), torch.tensor([[1, 2, 4], [4, 3, 9]])
    weights = {"per_sample_weights": torch.rand(8)} if mode == "sum" else {}
    yield (bags,), {}
    yield (flat, torch.tensor([0, 3, 3, 6])), {}
    yield (flat.int(), torch.tensor([0, 3, 3, 6])), {}
    yield (flat,), {"offsets": torch.tensor([0, 4]), **weights}
    yield (torch.zeros(0, dtype=torch.long), torch.tensor([0, 0])), {}
    if mode == "sum":
        yield (bags, None, torch.rand(2, 3)), {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("padding", [None, 4, -1])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_are_reduced_as_by_the_float_layer(table, mode, padding, dtype):
    layer, ours = put_beside(nn.EmbeddingBag(10, 16, mode=mode, padding_idx=padding, dtype=dtype))
    assert isinstance(ours, nn.EmbeddingBag)
    for args, kwargs in calls(mode):
        args = tuple(each.to(dtype) if each is not None and each.is_floating_point() else each for each in args)
        kwargs = {name: each.to(dtype) if each.is_floating_point() else each for name, each in kwargs.items()}
        got = ours(*args, **kwargs)
        assert got.dtype == dtype
        assert torch.allclose(got, layer(*args, **kwargs), rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_the_last_offset_may_be_included(table):
    layer, ours = put_beside(nn.EmbeddingBag(10, 16, include_last_offset=True))
    input, offsets = torch.tensor([1, 2, 4, 5]), torch.tensor([0, 1, 4])
    assert torch.allclose(ours(input, offsets), layer(input, offsets), atol=1e-6)
    assert ours(input, offsets).shape == (2, 16)


def test_weights_of_the_samples_get_their_gradients(table):
    layer, ours = put_beside(nn.EmbeddingBag(10, 16, mode="sum"))
    input, given = torch.tensor([[1, 2], [4, 5]]), torch.rand(2, 2)
    gradients = []
    for each in (layer, ours):
        weights = given.clone().requires_grad_()
        each(input, per_sample_weights=weights).square().sum().backward()
        gradients.append(weights.grad)
    assert torch.allclose(*gradients, rtol=1e-5)


@pytest.mark.parametrize("wrong", [{"per_sample_weights": torch.rand(2, 2)}, {"offsets": torch.tensor([0])}])
def test_what_the_float_layer_refuses_is_refused(table, wrong):
    layer, ours = put_beside(nn.EmbeddingBag(10, 16, mode="max"))
    input = torch.tensor([[1, 2], [4, 5]])
    errors = []
    for each in (layer, ours):
        with pytest.raises((ValueError, NotImplementedError)) as caught:
            each(input, **wrong)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


# Packed rows


@pytest.mark.skipif(not has_fbgemm_rows(), reason="no packed rows on this processor")
class TestPackedRows:
    def test_they_are_the_only_copy_and_follow_what_is_written_to_the_codes_and_scales(self):
        model, words = nn.Sequential(nn.Embedding(30, 9)), torch.tensor([[0, 29], [4, 4]])
        quantize(model)
        layer, found = model[0], model(words)
        assert layer.choice.kernel == "int8-rows"
        assert layer._buffers["int8_weights"] is None
        layer.scales.mul_(2)
        assert torch.equal(model(words), 2 * found)
        layer.int8_weights.zero_()
        assert not model(words).any()
        layer.quantize(torch.ones(30, 9))
        assert torch.allclose(model(words), torch.ones(2, 2, 9))

    def test_a_scale_too_large_for_them_is_looked_up_in_the_codes(self):
        weight = torch.full((5, 4), 3e38)
        model = nn.Sequential(nn.Embedding(5, 4, _weight=weight))
        quantize(model)
        assert torch.equal(model(torch.arange(5)), torch.as_tensor(model[0].weight))
        assert model(torch.arange(5)).isfinite().all()

    def test_layers_that_share_codes_share_them_after_they_were_packed_for_different_kernels(self):
        model = nn.Sequential(nn.Embedding(1200, 1200), nn.Linear(1200, 1200, bias=False))
        model[1].weight = model[0].weight
        quantize(model)
        model(torch.arange(3))
        assert {*model[0]._forms}.isdisjoint(model[1]._forms)
        assert model[0].int8_weights is model[1].int8_weights
        assert len({value.data_ptr() for name, value in model.state_dict().items() if "int8" in name}) == 1

    def test_a_bag_has_the_same_bits_alone_and_among_others_whatever_the_strides_of_its_indices(self):
        model, bags = nn.Sequential(nn.EmbeddingBag(50, 16)), torch.randint(50, (6, 4)).t()
        quantize(model)
        assert torch.equal(model(bags)[1:2], model(bags[1:2]))
        assert torch.equal(model(bags), model(bags.contiguous()))

    @pytest.mark.parametrize("method", ["w8a32", "w8a8"])
    def test_the_plan_counts_what_a_tied_layer_holds_in_memory_besides(self, method):
        model = nn.Sequential(nn.Embedding(200, 64), nn.Linear(64, 200, bias=False))
        model[1].weight = model[0].weight
        words, head = quantize(model, {"method": method, "kernel": "compact"})
        codes, scales = 200 * 64, 4 * 200
        assert words.memory_bytes == codes + scales
        assert head.memory_bytes == codes  # packed rows are in no product's form

    @pytest.mark.parametrize("wrong", [[0, 20], [-1]])
    def test_an_index_beyond_the_table_is_told_as_without_them(self, wrong):
        for layer, error in ((nn.Embedding(20, 8), IndexError), (nn.EmbeddingBag(20, 8), (IndexError, RuntimeError))):
            model, index = nn.Sequential(layer), torch.tensor([wrong])
            with pytest.raises(error):
                model(index)
            quantize(model)
            with pytest.raises(error):
                model(index)


# Both


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.bag = nn.Embedding(10, 8), nn.EmbeddingBag(10, 8, mode="sum", padding_idx=1)

    def forward(self, words):
        return self.words(words) + self.bag(words)[:, None]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_copies_pickles_casts_and_graphs_give_what_the_layers_give(table):
    model, words = Reads().eval(), torch.tensor([[0, 1, 2], [3, 4, 9]])
    quantize(model)
    wanted = model(words)
    assert torch.equal(copy.deepcopy(model)(words), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(model))(words), wanted)
    assert torch.allclose(fx.symbolic_trace(model)(words), wanted)
    assert torch.allclose(torch.jit.trace(model, (words,))(words), wanted)
    not_called_yet = copy.deepcopy(model)
    assert torch.allclose(torch.compile(not_called_yet, fullgraph=True, backend="eager")(words), wanted)
    exported = torch.export.export(copy.deepcopy(model), (words,)).module()
    assert torch.allclose(exported(words), wanted)
    assert model.words.int8_weights.dtype == torch.int8
    half = copy.deepcopy(model).half()
    assert half.words.int8_weights.dtype == torch.int8
    assert half.words.scales.dtype == torch.float32
    assert torch.allclose(half(words).float(), wanted, atol=0.01)
    assert set(model.state_dict()) == {
        f"{name}.{part}" for name in ("words", "bag") for part in ("int8_weights", "scales")
    }


def test_a_large_table_takes_one_byte_a_value(table):
    model = nn.Sequential(nn.Embedding(2100, 512))
    quantize(model)
    model[0](torch.arange(1000))
    assert all(form.holds_codes for form in model[0]._forms.values())
    assert (model[0]._buffers["int8_weights"] is None) == bool(model[0]._forms)


@pytest.mark.parametrize("kernel", ["auto", "compact"])
@pytest.mark.parametrize("method", ["w8a32", "w4a32"])
def test_no_indices_give_no_rows(table, method, kernel):
    model = nn.Sequential(nn.Embedding(50, 64))
    quantize(model, {"method": method, "kernel": kernel})
    assert model(torch.zeros(3, 0, dtype=torch.long)).shape == (3, 0, 64)


def test_a_float_copy_is_kept_of_float32_tables_and_of_large_ones_if_it_is_asked_for(monkeypatch, unpacked):
    monkeypatch.delenv("TINYQ_KERNEL", raising=False)
    words = torch.arange(5)
    for dtype in DTYPES:
        model = nn.Sequential(nn.Embedding(10, 8, dtype=dtype))
        (decision,) = quantize(model)
        assert decision.kernel == model[0].choice
        model(words)
        assert model[0].choice.bytes_a_weight == (5 if dtype == torch.float32 else 1)
        assert bool(model[0]._forms) == (dtype == torch.float32)
    casted = nn.Sequential(nn.Embedding(10, 8))
    quantize(casted)
    assert (casted[0].choice.kernel, casted.half()[0].choice.kernel) == ("float32", "reference")
    monkeypatch.setenv("TINYQ_KERNEL", "float32")
    large = nn.Sequential(nn.Embedding(2100, 512))
    quantize(large)
    large(words)
    assert large[0].choice.kernel == "float32"
    assert large[0]._forms


def test_a_pickle_leaves_the_choice_of_a_kernel_to_the_machine_that_reads_it(monkeypatch, unpacked):
    monkeypatch.delenv("TINYQ_KERNEL", raising=False)
    model = nn.Sequential(nn.Embedding(10, 8), nn.EmbeddingBag(10, 8), nn.LSTM(8, 8), nn.GRUCell(8, 8))
    quantize(model)
    assert {layer.choice.kernel for layer in model} == {"float32"}
    written = pickle.dumps(model)
    monkeypatch.setenv("TINYQ_KERNEL", "reference")
    assert {layer.choice.kernel for layer in pickle.loads(written)} == {"reference"}


@pytest.mark.parametrize("method", ["w8a32", "w8a8"])
def test_ties_between_the_kinds_share_codes_and_come_back(method):
    class Coder(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.bag = nn.Embedding(10, 8), nn.EmbeddingBag(10, 8)
            self.head = nn.Linear(8, 10)
            self.bag.weight = self.head.weight = self.words.weight

        def forward(self, words):
            return self.head(self.words(words) + self.bag(words)[:, None])

    model, words = Coder(), torch.tensor([[0, 1, 2], [3, 4, 9]])
    wanted = model(words)
    with quantized(model, method) as plan:
        assert model.words.int8_weights is model.bag.int8_weights is model.head.int8_weights
        assert torch.allclose(model(words), wanted, atol=0.1)
        assert isinstance(model.bag, QuantizedEmbeddingBag)
    assert [decision.tied_to for decision in plan] == [None, "words", "words"]
    assert [decision.method for decision in plan] == ["w8a32", "w8a32", method]
    assert plan.label == method
    assert model.bag.weight is model.head.weight is model.words.weight
    assert torch.equal(model(words), wanted)
    with quantized(model, {"exclude": ["bag"]}) as plan:
        assert [decision.reason for decision in plan] == [
            "tied to bag.weight (excluded)",
            "excluded",
            "tied to bag.weight (excluded)",
        ]


class Bagged(nn.Module):
    def __init__(self, mode, padding):
        super().__init__()
        self.bag = nn.EmbeddingBag(40, 16, mode=mode, padding_idx=padding)

    def forward(self, words):
        return self.bag(words)


@pytest.mark.parametrize("padding", [None, 0, -1])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_graph_of_bags_takes_any_number_of_them(mode, padding):
    model = Bagged(mode, padding).eval()
    quantize(model, "w8a32")
    words = torch.randint(0, 40, (6, 5))
    words[1] = 39 if padding == -1 else 0
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (words[:3],), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(program(words), model(words), rtol=1e-5, atol=1e-5)


def test_as_many_rows_are_looked_up_by_indices_of_any_dtype_and_shape(table):
    ours, theirs = put_beside(nn.Embedding(10, 16))
    index = torch.tensor([3, 9, 0, 3, 7, 1])
    for each in (index, index.int(), index, index.view(2, 3), index.int().view(3, 2), index.flip(0)[::2], index[2]):
        assert torch.equal(ours(each), theirs(each))
