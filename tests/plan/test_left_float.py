"""What cannot become codes without a loss stays float with the reason, and what is no part of the model is left out."""

from __future__ import annotations

import pytest
import torch
from models import Net, keeper, loader, trainer
from torch import nn
from torch.nn.utils import prune
from torchmetrics import Metric, MetricCollection

from tinyq_lightning import TinyQCallback, load_quantized, quantize, quantized
from tinyq_lightning.errors import ModelError, SpecError
from tinyq_lightning.plan import check_model
from tinyq_lightning.spec import as_spec


class Tagged(torch.Tensor):
    pass


def with_a_buffer(linear):
    linear.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0, 1.0]))
    linear.register_forward_hook(lambda module, args, out: out * module.mask)


def with_a_parameter(linear):
    linear.gain = nn.Parameter(torch.full((4,), 2.0))
    linear.register_forward_hook(lambda module, args, out: out * module.gain)


def with_a_module(linear):
    linear.adapter = nn.Linear(8, 4)
    linear.register_forward_hook(lambda module, args, out: out + module.adapter(args[0]))


def with_a_pruned_bias(linear):
    prune.l1_unstructured(linear, "bias", 0.5)


def with_a_state_dict_hook(linear):
    linear.register_state_dict_post_hook(lambda module, state, prefix, metadata: state.update(more=torch.ones(1)))


def with_a_load_hook(linear):
    linear.register_load_state_dict_post_hook(lambda module, keys: None)


@pytest.mark.parametrize(
    ("attach", "reason"),
    [
        (with_a_buffer, "it holds mask besides its weight"),
        (with_a_parameter, "it holds gain besides its weight"),
        (with_a_module, "it holds adapter besides its weight"),
        (with_a_pruned_bias, "it holds bias_mask, bias_orig besides its weight"),
        (with_a_state_dict_hook, "it has a state_dict hook"),
        (with_a_load_hook, "it has a hook of load_state_dict"),
    ],
)
def test_what_was_attached_to_a_layer_is_not_lost(attach, reason):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).eval(), torch.randn(3, 8)
    attach(model[1])
    layer, wanted, state = model[1], model[1](x), set(model[1].state_dict())
    plan = {decision.name: decision for decision in quantize(model)}
    assert (plan["0"].method, plan["1"].method, plan["1"].reason) == ("w8a32", "float", reason)
    assert model[1] is layer
    torch.testing.assert_close(layer(x), wanted, atol=0.05, rtol=0.05)
    if attach is with_a_module:  # what is attached is a layer of the model like any other
        assert plan["1.adapter"].method == "w8a32"
    else:
        assert set(layer.state_dict()) == state


def complex_weight(linear):
    linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))


def whole_numbers(linear):
    linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int32), requires_grad=False)


def no_rows(linear):
    linear.out_features, linear.weight, linear.bias = 0, nn.Parameter(torch.zeros(0, 4)), None


def other_rows(linear):
    linear.weight = nn.Parameter(torch.zeros(3, 4))


def odd_bias(linear):
    linear.bias = nn.Parameter(torch.zeros(1))


def tagged_bias(linear):
    linear.bias = nn.Parameter(torch.zeros(4).as_subclass(Tagged))


def three_dimensions(linear):
    linear.weight = nn.Parameter(torch.zeros(2, 4, 4))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (complex_weight, "its weight is complex64"),
        (whole_numbers, "its weight is int32"),
        (no_rows, "its weight is empty: [0, 4]"),
        (other_rows, "its weight is [3, 4] where its sizes tell of [4, 4]"),
        (odd_bias, "its bias is [1] where its sizes tell of [4]"),
        (tagged_bias, "its bias has the type Tagged"),
        (three_dimensions, "its weight is [2, 4, 4] where its sizes tell of [4, 4]"),
    ],
)
def test_odd_layers_stay_as_they_are_and_refuse_nothing(change, reason):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    change(model[1])
    with quantized(model, "w8a8") as plan:
        assert [(d.method, d.reason) for d in plan] == [("w8a8", "spec"), ("float", reason)]
    check_model(as_spec("w8a8"), model)


class Judge(Metric):
    """As FID and BERTScore: it holds a network, which measures the model."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)).requires_grad_(False)
        self.add_state("total", torch.tensor(0.0), "sum")

    def update(self, x):
        self.total = self.total + self.network(x).sum()

    def compute(self):
        return self.total


class Judged(Net):
    def __init__(self):
        super().__init__()
        self.judge, self.more = Judge(), MetricCollection({"again": Judge()})

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.judge.update(batch[0])
        self.log("val_judge", self.judge)


def test_a_network_inside_a_metric_is_no_part_of_the_model(tmp_path):
    callback = TinyQCallback("w8a8", report=False)
    trainer(tmp_path, keeper(tmp_path), callback, max_epochs=1).fit(Judged(), loader(), loader(seed=1))
    assert [decision.name for decision in callback.plan] == ["body.0", "body.2", "head"]
    assert callback.results["val_judge"]["delta"] == 0
    assert callback.plan.others == ()
    again = load_quantized(callback.quantized_path, Judged)
    assert type(again.judge.network[0]) is nn.Linear


class Experts(nn.Module):
    """All experts of a layer in one parameter."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 8, 16))
        self.scale = nn.Parameter(torch.ones(8))


def test_the_last_line_of_the_plan_names_what_else_holds_matrices():
    model = nn.ModuleDict({"head": nn.Linear(8, 8), "experts": Experts(), "norm": nn.LayerNorm([3, 8])})
    plan = quantize(model)
    assert plan.table().splitlines()[-1] == (
        "not in a layer of the plan, and left as they are: 3 weights of 2.24 kB "
        "(experts.up [4, 8, 16], norm.weight [3, 8], norm.bias [3, 8])"
    )
    assert plan.others_note() == plan.table().splitlines()[-1]
    assert quantize(nn.Sequential(nn.Linear(4, 4))).others_note() is None


@pytest.mark.parametrize(
    ("model", "keys", "error", "said"),
    [
        (nn.Sequential(nn.BatchNorm1d(1)), {}, ModelError, "has no layer to quantize"),
        (nn.Sequential(nn.Linear(1, 1)), {}, ModelError, r"nothing to quantize \(0: int8 is no smaller"),
        (nn.Sequential(nn.Linear(4, 4, dtype=torch.cfloat)), {}, ModelError, r"nothing to quantize \(0: its weight is"),
        (nn.Sequential(nn.Linear(4, 4)), {"exclude": ["0"]}, SpecError, "leaves the only layer float"),
        (nn.Linear(4, 4), {}, ModelError, "cannot be replaced in place"),
    ],
)
def test_what_cannot_work_is_known_without_a_look_at_the_weights(model, keys, error, said):
    with pytest.raises(error, match=said):
        check_model(as_spec(keys), model.to("meta"))


def test_a_plan_that_a_run_left_all_float_is_accepted():
    model = nn.Sequential(nn.Linear(4, 4))
    check_model(as_spec({"rules": [{"match": "0", "method": "float", "decided_by": "timing"}]}), model)
    check_model(as_spec({"rules": [{"match": "0", "method": "float", "reason": "budget: it hurts"}]}), model)
