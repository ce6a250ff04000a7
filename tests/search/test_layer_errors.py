"""Measuring layers on real batches: what is measured, and that it never disturbs the model that runs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tinyq_lightning import QuantizationSpec
from tinyq_lightning.plan.swap import Swap
from tinyq_lightning.search.layer_calls import counted_calls
from tinyq_lightning.search.layer_errors import measured_layers


def measured(model, run, **spec):
    """The errors by layer, and what ``run(model)`` returns while they are measured."""
    with torch.no_grad(), measured_layers(Swap(model, QuantizationSpec(**spec))) as errors:
        returned = run(model)
    assert not any(module._forward_hooks for module in model.modules())
    return errors, returned


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_a_nested_tensor_is_measured_by_its_values(layout):
    model = nn.Sequential(nn.Linear(8, 4))
    parts = [torch.randn(3, 8), torch.randn(5, 8)]
    nested, _ = measured(model, lambda m: m(torch.nested.nested_tensor(parts, layout=layout)))
    plain, _ = measured(model, lambda m: m(torch.cat(parts)))
    assert nested["0"].not_measured is None
    assert nested["0"].output_sqnr_db == pytest.approx(plain["0"].output_sqnr_db)
    assert nested["0"].crest == pytest.approx(plain["0"].crest)


def fails_the_second_time(layer):
    calls = []

    def forward(x):
        calls.append(1)
        if len(calls) > 1:
            raise ValueError("only once\nand no more")
        return nn.functional.linear(x, layer.weight, layer.bias)

    return forward


def test_a_layer_that_cannot_be_measured_is_noted_and_disturbs_nobody():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    swap = Swap(model, QuantizationSpec())
    model[1].forward = fails_the_second_time(model[1])
    x = torch.randn(6, 8)
    with torch.no_grad(), measured_layers(swap) as errors:
        out = model(x)
    assert out.shape == (6, 4)
    assert errors["0"].output_sqnr_db["w8a32"] > 20
    assert errors["1"].not_measured == "ValueError: only once"
    assert errors["1"].output_sqnr_db == {}


def test_a_call_that_cannot_be_measured_leaves_out_that_call_alone():
    model = nn.Sequential(nn.Linear(8, 4))
    x = torch.randn(6, 8)
    expected, _ = measured(model, lambda m: m(x))

    def mixed(m):
        m(x)
        torch.func.vmap(m)(x[None])

    errors, _ = measured(model, mixed)
    assert errors["0"].not_measured is None
    assert errors["0"].output_sqnr_db == expected["0"].output_sqnr_db
    errors, _ = measured(model, lambda m: torch.func.vmap(m)(x[None]))
    assert errors["0"].not_measured.startswith("RuntimeError: vmap")


def test_a_compiled_model_runs_and_says_that_it_was_compiled():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(6, 8)
    with torch.no_grad():
        expected = model(x)
    errors, out = measured(model, lambda m: torch.compile(m, backend="eager", fullgraph=True)(x))
    assert torch.equal(out, expected)
    assert all(error.not_measured == "it was called in a compiled graph" for error in errors.values())


@pytest.mark.parametrize("lengths", [[0], [0, 3], [3, 0]])
def test_calls_without_rows_are_left_out(lengths):
    model = nn.Sequential(nn.Linear(8, 4))
    errors, _ = measured(model, lambda m: [m(torch.randn(length, 8)) for length in lengths])
    assert set(errors) == ({"0"} if any(lengths) else set())
    assert all(error.output_sqnr_db["w8a8"] > 20 for error in errors.values())


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_inputs_by_keyword_in_any_shape_and_dtype(shape, dtype):
    model = nn.Sequential(nn.Linear(8, 4, dtype=dtype))
    errors, out = measured(model, lambda m: m[0](input=torch.randn(shape, dtype=dtype)))
    assert out.shape == (*shape[:-1], 4)
    assert errors["0"].not_measured is None
    assert set(errors["0"].output_sqnr_db) == {"w8a8", "w8a16", "w8a32"}


def test_under_autocast_and_in_inference_mode():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    swap = Swap(model, QuantizationSpec())
    x = torch.randn(16, 8)
    with torch.inference_mode(), measured_layers(swap) as errors, torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            model(x)
    assert all(error.not_measured is None and error.output_sqnr_db["w8a8"] > 20 for error in errors.values())


def test_an_error_of_the_models_own_is_still_the_models_own():
    model = nn.Sequential(nn.Linear(8, 4))
    swap = Swap(model, QuantizationSpec())
    for watching in (lambda: measured_layers(swap), lambda: counted_calls(swap, {})):
        with pytest.raises(TypeError), watching():
            model[0]()
        with pytest.raises(TypeError), watching():
            model[0]("text")


def test_the_model_gives_the_same_bits_and_keeps_its_weights():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    before, x = copy.deepcopy(model.state_dict()), torch.randn(16, 8)
    torch.manual_seed(0)
    with torch.no_grad():
        expected = model(x)
    torch.manual_seed(0)
    _, out = measured(model, lambda m: m(x))
    assert torch.equal(out, expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
