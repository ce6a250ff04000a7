"""Matrices that no layer of torch's has: codes in the file, their values where the module reads them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import Net, keeper, loader, trainer
from torch import nn

from tinyq_lightning import TinyQCallback, load_quantized, quantize, quantized
from tinyq_lightning.errors import ReadOnlyWeightError, SpecError
from tinyq_lightning.layers import Int8Matrix
from tinyq_lightning.spec import as_spec, names_parameter

RULES = {"rules": [{"match": "experts.up", "method": "w8a8"}]}


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.ones(3))
        self.up = nn.Parameter(torch.randn(4, 8, 16))
        self.down = nn.Parameter(torch.randn(4, 16, 8))
        self.bias = nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        return torch.einsum("nd,edh,ehd->nd", x, self.up, self.down) + self.bias.sum(0)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts, self.head = Experts(), nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.experts(x))


def test_it_is_quantized_only_where_a_rule_names_it():
    model, x = Model(), torch.randn(5, 8)
    wanted = model(x).detach()
    assert [decision.name for decision in quantize(copy.deepcopy(model))] == ["head"]
    plan = quantize(model, RULES)
    assert [(each.name, each.kind, each.method, each.reason) for each in plan] == [
        ("head", "linear", "w8a32", "spec"),
        ("experts.up", "matrix", "w8a32", "rule 1; a matrix that is read has no activations"),
    ]
    assert plan.decisions[1].bytes == 4 * 8 * (16 + 4)
    assert 35 < plan.decisions[1].weight_sqnr_db < 60
    assert "not in a layer of the plan" in plan.others_note()
    assert "experts.up" not in plan.others_note()
    assert torch.allclose(model(x), wanted, atol=0.05 * float(wanted.abs().max()))
    state = model.state_dict()
    assert state["experts.up.int8_weights"].shape == (4, 8, 16)
    assert state["experts.up.scales"].shape == (32,)
    assert "experts.up" not in state
    assert [decision.reason for decision in quantize(model)] == ["already quantized"] * 2


class Bank(nn.Module):
    """A convolution whose weight is mixed from a bank for each batch."""

    def __init__(self, width=3):
        super().__init__()
        self.kernels = nn.Parameter(torch.randn(3, 8, 4, width, width))

    def forward(self, x):
        return nn.functional.conv2d(x, self.kernels.mean(0))


@pytest.mark.parametrize("method", ["w8a32", "w4a32"])
def test_rows_of_a_bank_of_kernels_are_as_long_as_those_of_a_convolution(method):
    model, x = nn.Sequential(Bank()), torch.randn(2, 4, 5, 5)
    wanted = model(x).detach()
    (decision,) = quantize(model, {"rules": [{"match": "kernels", "method": method}]})
    share = {"w8a32": 1 + 4 / 36, "w4a32": 0.5 + (4 + 1) / 36}[method] / 4
    assert decision.bytes == round(share * decision.float_bytes)
    assert decision.weight_sqnr_db > {"w8a32": 42, "w4a32": 18}[method]
    assert model.state_dict()["0.kernels.scales"].shape == (3 * 8,)
    assert (model(x) - wanted).norm() < {"w8a32": 0.02, "w4a32": 0.2}[method] * wanted.norm()


def test_a_bank_of_short_rows_is_packed_where_memory_is_to_be_small():
    packed, plain = Bank(width=3), Bank(width=3)
    plain.load_state_dict(packed.state_dict())
    for model, kernel in ((packed, "compact"), (plain, "auto")):
        rule = {"match": "0.kernels", "method": "w4a32"}
        quantize(nn.Sequential(model), {"rules": [rule], "kernel": kernel})
    assert torch.equal(packed.kernels, plain.kernels)


@pytest.mark.parametrize("method", ["w8a32", "w4a32"])
def test_a_state_with_a_scale_for_each_row_of_the_last_dimension_means_what_it_meant(method):
    bank, rule = Bank(width=5), {"rules": [{"match": "kernels", "method": method}]}
    flat = nn.Module()
    flat.kernels = nn.Parameter(bank.kernels.detach().reshape(-1, 5))
    old, model = nn.Sequential(flat), nn.Sequential(bank)
    for each in (old, model):
        quantize(each, rule)
    state = old.state_dict()
    if method == "w8a32":
        state["0.kernels.int8_weights"] = state["0.kernels.int8_weights"].view(3, 8, 4, 5, 5)
    model.load_state_dict(state)
    assert torch.equal(bank.kernels, flat.kernels.view(3, 8, 4, 5, 5))
    assert quantize(model).decisions[0].weight_sqnr_db is None
    assert copy.deepcopy(model).state_dict()["0.kernels.scales"].shape == (3 * 8 * 4 * 5,)


@pytest.mark.parametrize(
    "match", ["experts", "*", "experts.*", "*.*", "experts.u*", "re:.*", r"re:all\.\w+(\.[a-z]+)?"]
)
def test_a_pattern_for_what_is_above_it_does_not_name_it(match):
    if match.startswith("experts"):
        told = r"It covers 'experts\.up', a parameter that no layer has: .* ends with their name, here 'up'\."
        with pytest.raises(SpecError, match=told):
            quantize(Model(), {"rules": [{"match": match, "method": "w8a32"}]})
    else:
        model = nn.ModuleDict({"all": Model()})
        assert [each.name for each in quantize(model, {"rules": [{"match": match, "method": "w8a32"}]})] == ["all.head"]


@pytest.mark.parametrize("match", ["up", "experts.up", "*.up", r"re:.*\.up", r"re:experts\.up", r"re:.*\.(up|gate)"])
def test_a_pattern_that_ends_with_its_name_names_it(match):
    plan = quantize(Model(), {"rules": [{"match": match, "method": "w8a32"}]})
    assert [decision.name for decision in plan] == ["head", "experts.up"]


class Books(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ParameterList([nn.Parameter(torch.randn(4, 16)) for _ in range(2)])])
        self.books = nn.ParameterList([nn.Parameter(torch.randn(4, 16)) for _ in range(2)])
        self.head = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("match", "found"),
    [
        ("books.*", ["books.0", "books.1"]),
        (r"re:books\.\d+", ["books.0", "books.1"]),
        ("layers.*.*", None),
        ("layers.0.*", ["layers.0.0", "layers.0.1"]),
        ("layers.*", None),
        ("books", None),
    ],
)
def test_a_list_of_parameters_is_named_by_its_own_name(match, found):
    spec = {"rules": [{"match": match, "method": "w8a32"}]}
    if found:
        assert [decision.name for decision in quantize(Books(), spec)] == ["head", *found]
    else:
        with pytest.raises(
            SpecError, match=r"a parameter that no layer has: .* their name, here '(books|layers\.0)\.\*'"
        ):
            quantize(Books(), spec)


def test_what_is_read_is_the_dequantized_value_and_cannot_be_assigned():
    model = Model()
    quantize(model, RULES)
    child = model.experts.up_codes
    assert isinstance(child, Int8Matrix)
    values = child.int8_weights * child.scales.view(4, 8, 1)
    assert torch.equal(model.experts.up, values)
    assert torch.equal(model.experts.up[2], values[2])
    with pytest.raises(ReadOnlyWeightError, match="up of Experts is a read-only view"):
        model.experts.up = nn.Parameter(torch.zeros(4, 8, 16))
    again = copy.deepcopy(model)
    again.experts.up_codes.quantize(torch.zeros(4, 8, 16))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.experts.up, values)
    model.experts.first = nn.Parameter(torch.zeros(3))
    with pytest.raises(AttributeError, match="'Experts' object has no attribute 'missing'"):
        _ = model.experts.missing


@pytest.mark.parametrize("patterns", [["up"], ["down"], ["up", "down", "bias"]])
def test_afterwards_all_is_as_it_was(patterns):
    model, x = Model(), torch.randn(5, 8)
    before, parameters, wanted = model.experts, list(model.named_parameters()), model(x)
    with quantized(model, {"rules": [{"match": each, "method": "w8a32"} for each in patterns]}) as plan:
        assert len(plan) == 1 + len(patterns)
        assert isinstance(model.experts, Experts)
        assert len(list(model.parameters())) < len(parameters)
        assert torch.allclose(model(x), wanted, atol=0.1 * float(wanted.detach().abs().max()))
    assert model.experts is before
    assert type(before) is Experts
    after = list(model.named_parameters())
    assert [name for name, _ in after] == [name for name, _ in parameters]
    assert all(a is b for (_, a), (_, b) in zip(after, parameters, strict=True))
    assert torch.equal(model(x), wanted)


def test_copies_pickles_casts_and_graphs():
    model, x = Model().eval(), torch.randn(5, 8)
    quantize(model, RULES)
    wanted = model(x).detach()
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), wanted)
    assert type(copied.experts).__qualname__ == "Experts"
    assert copied.experts.up_codes is not model.experts.up_codes
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), wanted)
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, fullgraph=True, backend="eager")(x), wanted, atol=1e-4)
        assert torch.allclose(torch.export.export(model, (x,), strict=False).module()(x), wanted, atol=1e-4)
    half = copied.half()
    assert half.experts.up.dtype == torch.float16
    assert half.experts.up_codes.int8_weights.dtype == torch.int8


class WithPositions(Net):
    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(16, 32))


def test_copies_and_pickles_leave_behind_what_the_module_itself_leaves_behind(tmp_path):
    model = WithPositions()
    model.trainer = trainer(tmp_path)
    quantize(model, {"rules": [{"match": "positions", "method": "w8a32"}]})
    assert isinstance(model.positions_codes, Int8Matrix)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied._trainer is None
        assert torch.equal(copied.positions, model.positions)
    assert model._trainer is not None


def test_a_bilinear_layer_a_list_and_a_table_of_positions():
    class Some(nn.Module):
        def __init__(self):
            super().__init__()
            self.bilinear = nn.Bilinear(6, 7, 5)
            self.codebooks = nn.ParameterList([nn.Parameter(torch.randn(9, 8)) for _ in range(2)])
            self.relative_position_bias_table = nn.Parameter(torch.randn(16, 8))

        def forward(self, x, y):
            return self.bilinear(x, y), self.codebooks[1].sum() + self.relative_position_bias_table.sum()

    model, x, y = Some(), torch.randn(3, 6), torch.randn(3, 7)
    wanted = model(x, y)
    names = ["bilinear.weight", "codebooks.1", "relative_position_bias_table"]
    plan = quantize(model, {"method": "float", "rules": [{"match": name, "method": "w8a32"} for name in names]})
    assert {decision.name for decision in plan} == set(names)
    assert torch.allclose(model(x, y)[0], wanted[0], atol=0.05)
    assert len(model.codebooks) == 2
    assert [type(each) is nn.Parameter for each in model.codebooks] == [True, False]


@pytest.mark.parametrize("method", ["tie", "property"])
def test_what_cannot_be_replaced_stays_float_with_the_reason(method):
    model = Model()
    if method == "tie":
        model.experts.again = model.experts.up
        reason = "tied to experts.again"
    else:
        type(model.experts).up = None
        reason = "Experts has an attribute up of its own"
    try:
        plan = quantize(model, RULES)
    finally:
        if method == "property":
            del type(model.experts).up
    assert plan.decisions[1].method == "float"
    assert plan.decisions[1].reason == reason


class WithTable(Net):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 8) / 8)

    def forward(self, x):
        return super().forward(x + x @ self.table)


@pytest.mark.parametrize("door", ["load", "ckpt_path"])
def test_a_run_saves_it_and_every_door_loads_it(tmp_path, door):
    spec = {"method": "w8a8", "rules": [{"match": "table", "method": "w8a8"}]}
    callback = TinyQCallback(spec, monitor="val_acc", max_drop=0.5, report="full")
    run, module = trainer(tmp_path, keeper(tmp_path), callback), WithTable()
    run.fit(module, loader(shuffle=True), loader(seed=1))
    assert callback.error is None
    assert type(module) is WithTable
    assert callback.plan.label == "w8a8"
    assert callback.plan.decisions[-1].name == "table"
    if door == "load":
        loaded = load_quantized(callback.quantized_path, WithTable)
        assert isinstance(loaded, WithTable)
        with quantized(module, callback.plan.to_spec()):
            assert torch.equal(module.table, loaded.table)
            assert all(torch.equal(a, b) for a, b in zip(module.buffers(), loaded.buffers(), strict=True))
    else:
        result = run.test(module, loader(), ckpt_path=callback.quantized_path, verbose=False)
        assert result
        assert type(module) is WithTable
        assert type(module.table) is nn.Parameter


@pytest.mark.parametrize("match", ["re:.*\\w", "re:[a-v]+", "re:.*", "re:.+p"])
def test_a_regular_expression_that_only_happens_to_fit_does_not_name_a_parameter(match):
    spec = as_spec({"rules": [{"match": match, "method": "w8a32"}]})
    assert not names_parameter(spec, "w")
    assert not names_parameter(spec, "experts.w")


def test_the_weight_of_a_layer_is_not_said_to_be_a_parameter_of_none():
    for spec in ({"exclude": ["head.weight"]}, {"rules": [{"match": "head.weight", "method": "w8a32"}]}):
        with pytest.raises(SpecError, match=r"Did you mean 'head'\?"):
            quantize(Model(), spec)
