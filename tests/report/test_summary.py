"""The model summary: int8 weights counted as the weights they are, at the bytes they take."""

from __future__ import annotations

import copy
import importlib
import logging

import lightnings
import pytest
import torch
from models import Net, loader, trainer
from torch import nn
from transformer import Adapted, Language, words

from tinyq_lightning import QuantizedModelSummary, quantize, summarize
from tinyq_lightning.layers.int8_weight import Int8Weight


class Adapter(Net):
    """A low-rank adapter on a head that is frozen, as all below it."""

    def __init__(self):
        super().__init__()
        quantize(self)
        self.requires_grad_(False)
        self.head = Adapted(self.head)


def rows(summary):
    return dict(zip(summary.layer_names, summary.param_nums, strict=True))


@pytest.mark.parametrize("method", ["w8a32", "w8a16", "w8a8"])
def test_counts_are_those_of_the_float_module_and_int8_weights_cannot_be_trained(method):
    model = Language()
    before, weights = lightnings.summarize(model, max_depth=-1), sum(p.numel() for p in model.parameters())
    counts, left = rows(before), sum(p.numel() for p in model.parameters() if p.dim() == 1)
    quantize(model, method)
    summary = summarize(model, max_depth=-1)
    assert summary.total_parameters == weights
    assert summary.trainable_parameters == left
    now = rows(summary)
    assert all(now[name] == count for name, count in counts.items())
    assert now["encoder.layers.0.self_attn.in_proj"] == 3 * 16 * 17


def test_a_float_module_has_the_summary_that_lightning_gives_it():
    model = Language()
    model.example_input_array = words()
    assert str(summarize(model, max_depth=2)) == str(lightnings.summarize(model, max_depth=2))


def test_flops_are_those_of_the_float_module():
    model = Net()
    model.example_input_array = torch.randn(5, 8)
    before = lightnings.summarize(model)
    if not hasattr(before, "total_flops"):
        pytest.skip("this Lightning counts none")
    quantize(model)
    model(torch.randn(3, 8))  # from here on the weights may be packed
    assert summarize(model).total_flops == before.total_flops > 0


def test_the_size_is_a_byte_a_weight_four_a_scale_and_the_rest_as_it_is():
    model = Net(width=16)
    quantize(model, {"method": "w8a32", "exclude": ["head"]})
    codes, scales, rest = 8 * 16 + 16 * 16, 16 + 16, 16 + 16 + 16 * 4 + 4
    assert summarize(model).model_size == pytest.approx((codes + 4 * scales + 4 * rest) * 1e-6)
    model.to(torch.bfloat16)
    assert summarize(model).model_size == pytest.approx((codes + 4 * scales + 2 * rest) * 1e-6)


def test_tied_weights_count_once_in_copies_and_after_a_move_too():
    model = Language()
    quantize(model)
    once, size = summarize(model).total_parameters, summarize(model).model_size
    assert once == sum(p.numel() for p in Language().parameters())
    assert rows(summarize(model))["head"] == rows(summarize(model))["embed"] + 20  # the bias
    for other in (copy.deepcopy(model), copy.deepcopy(model).to(torch.float64), copy.deepcopy(model).to("meta")):
        assert summarize(other).total_parameters == once
    assert summarize(copy.deepcopy(model).to("meta")).model_size == size


def test_no_code_is_read():
    model = Language()
    quantize(model)
    wanted = str(summarize(model, max_depth=-1))
    for layer in model.modules():
        if isinstance(layer, Int8Weight):
            layer._buffers["int8_weights"] = None
    assert str(summarize(model, max_depth=-1)) == wanted


def test_parameters_stay_what_an_optimizer_may_have():
    model = Language()
    quantize(model)
    summarize(model)
    assert all(parameter.is_floating_point() for parameter in model.parameters())
    model.requires_grad_(True)


@pytest.mark.filterwarnings("ignore:.*instance of `UninitializedParameter`")
def test_a_lazy_layer_has_no_weights_yet_and_no_size():
    model = Net()
    quantize(model)
    count, size = summarize(model).total_parameters, summarize(model).model_size
    model.more = nn.LazyLinear(3)
    assert (summarize(model).total_parameters, summarize(model).model_size) == (count, size)


@pytest.mark.parametrize("rich", ["", "installed", "progress bar"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_fit_of_an_adapter_prints_the_counts_and_sizes(tmp_path, monkeypatch, caplog, capsys, rich, precision):
    imports, name = importlib.import_module(f"{lightnings.NAMESPACE}.utilities.imports"), "_RICH_AVAILABLE"
    if rich == "progress bar":  # what tells where Lightning has no such name, before 2.6
        monkeypatch.delattr(imports, name, raising=False)
    elif hasattr(imports, name):
        monkeypatch.setattr(imports, name, bool(rich))
    elif rich:
        pytest.skip("this Lightning takes rich for a progress bar of rich alone")
    bars = [lightnings.RichProgressBar()] if rich == "progress bar" else []
    logging.getLogger(lightnings.NAMESPACE).setLevel(logging.INFO)
    caplog.set_level(logging.INFO)
    model, callback = Adapter(), QuantizedModelSummary(max_depth=2)
    settings = {"max_epochs": 1, "enable_model_summary": True, "enable_progress_bar": bool(bars)}
    run = trainer(tmp_path, callback, *bars, precision=precision, **settings)
    assert [each for each in run.callbacks if isinstance(each, lightnings.ModelSummary)] == [callback]
    run.fit(model, loader(), loader(seed=1))
    shown = capsys.readouterr().out if rich else caplog.text
    lines = [line.strip(" │") for line in shown.splitlines()]
    total, trained = 8 * 16 + 16 + 16 * 16 + 16 + 16 * 4 + 4 + 2 * (16 + 4), 2 * (16 + 4)
    names = ("Trainable params", "Non-trainable params", "Total params")
    found = {name: line.replace(name, "").strip(" :") for line in lines for name in names if name in line}
    assert found == {names[0]: str(trained), names[1]: str(total - trained), names[2]: str(total)}
    assert any("W8A32LinearLayer" in line and "272" in line for line in lines)
