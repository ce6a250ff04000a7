"""The share of all weights that a plan quantizes: right for any model and its file, and by type."""

from __future__ import annotations

import pytest
import torch
from models import TiedEncoder
from torch import nn
from torch.nn.utils import parametrizations

from tinyq_lightning import QuantizationSpec
from tinyq_lightning.plan import file_coverage
from tinyq_lightning.plan.swap import Swap


class Vision(nn.Module):
    """Nearly all of its weights are convolutions."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3))
        self.head = nn.Linear(64, 4)


def bytes_of(module):
    return sum(parameter.numel() * parameter.element_size() for parameter in set(module.parameters()))


def test_a_small_head_on_a_large_backbone_is_not_all_of_the_model():
    model = Vision()
    found = Swap(model, QuantizationSpec(kinds=("linear",))).plan.coverage
    linear = bytes_of(model.head)
    assert found.quantized_bytes == linear
    assert found.total_bytes == bytes_of(model)
    assert found.float_bytes["BatchNorm2d"] == bytes_of(model.features[1])
    assert list(found.float_bytes) == ["Conv2d", "BatchNorm2d"]
    assert str(found).startswith(f"{100 * linear / bytes_of(model):.1f} % of the weight bytes in int8 (w8a32), 1 of 3 ")
    assert "; in float 99.0 % Conv2d, 0.3 % BatchNorm2d" in str(found)
    whole = Swap(model, QuantizationSpec()).plan
    assert (
        str(whole.coverage) == "99.7 % of the weight bytes in int8 (w8a32), 3 of 3 layers; in float 0.3 % BatchNorm2d"
    )
    assert str(whole.coverage) == whole.table().splitlines()[-1]


def test_layers_whose_kind_lacks_the_method_are_told_apart():
    model = nn.ModuleList([nn.Linear(8, 8), nn.LSTM(8, 8), nn.Embedding(9, 8)])
    found = str(Swap(model, QuantizationSpec(method="w8a8")).plan.coverage)
    assert "in int8 (w8a8, 2 by w8a32), 3 of 3 layers" in found


def test_a_parameter_of_no_layer_is_one_of_its_module():
    model = Vision()
    model.position = nn.Parameter(torch.zeros(64, 64))
    found = str(Swap(model, QuantizationSpec()).plan.coverage)
    assert found.endswith(", 3 of 4 layers; in float 9.5 % parameters of Vision, 0.3 % BatchNorm2d")


MODELS = {
    "tied and attention": TiedEncoder,
    "shared layer": lambda: nn.Sequential(*[nn.Linear(8, 8)] * 3, nn.Linear(8, 4, bias=False)),
    "parametrized": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 4)),
    "keys of another size": lambda: nn.ModuleList([nn.MultiheadAttention(8, 2, kdim=4, vdim=4), nn.Linear(8, 8)]),
    "bias of keys": lambda: nn.ModuleList([nn.MultiheadAttention(8, 2, add_bias_kv=True), nn.Linear(8, 8)]),
}


@pytest.mark.parametrize("exclude", [(), ("re:.*out_proj|0|head",)])
@pytest.mark.parametrize("name", MODELS)
def test_plan_and_file_tell_the_same(name, exclude):
    torch.manual_seed(0)
    model = MODELS[name]()
    if exclude and not any("0" in path or "head" in path for path, _ in model.named_modules()):
        pytest.skip("nothing to exclude")
    swap = Swap(model, QuantizationSpec(exclude=exclude))
    planned = swap.plan.coverage
    assert planned.total_bytes == pytest.approx(bytes_of(model), rel=0.1)
    with swap:
        filed = file_coverage(swap.plan, model.state_dict())
    assert planned.quantized_bytes == filed.quantized_bytes
    assert planned.quantized_layers == filed.quantized_layers
    assert not {"ParametrizationList", "NonDynamicallyQuantizableLinear"} & set(planned.float_bytes)


def test_all_in_int8_is_all_and_nothing_is_nothing():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert str(Swap(model, QuantizationSpec()).plan.coverage) == (
        "100 % of the weight bytes in int8 (w8a32), 2 of 2 layers"
    )
    slower = dict.fromkeys(("0", "1"), ("float", "left float: slower"))
    nothing = Swap(model, QuantizationSpec()).switched(slower, "timing").plan.coverage
    assert str(nothing).startswith("0 % of the weight bytes in int8")
    assert str(nothing).endswith("0 of 2 layers; in float 100 % Linear")
