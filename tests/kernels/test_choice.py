"""Which kernel a layer takes, and why."""

import pytest
import torch
from kernel_cases import each_method, normal, random_layer, with_products
from torch import nn

from tinyq_lightning.errors import SpecError
from tinyq_lightning.kernels.base import LONGEST_SUM
from tinyq_lightning.kernels.choice import Choice, choose_kernel
from tinyq_lightning.layers.linear import LAYERS
from tinyq_lightning.methods import METHODS


@each_method
def test_with_vnni_layers_take_int8_and_small_ones_a_float_copy_for_few_rows(method, monkeypatch):
    with_products(monkeypatch, has_int8=True)
    small, middling, large = (choose_kernel("auto", METHODS[method], size, size) for size in (384, 768, 2048))
    assert {small.kernel, middling.kernel, large.kernel} == {"int8"}
    assert small.few_rows > middling.few_rows > large.few_rows == 0
    few = "float32" if method == "w8a32" else "float32x1"
    assert middling.label == f"{few} to {middling.few_rows - 1} row{'s' * (middling.few_rows > 2)}, int8"
    assert large.label == "int8"
    assert {small.reason, large.reason} == {"the processor has int8 products"}


def test_with_the_product_of_one_digit_w8a8_takes_it_and_the_others_do_not(monkeypatch):
    with_products(monkeypatch, has_int8=True, has_digit=True)
    for kernel in ("auto", "int8"):
        chosen = {method: choose_kernel(kernel, METHODS[method], 2048, 2048).kernel for method in METHODS}
        assert chosen == {"w8a32": "int8", "w8a16": "int8", "w8a8": "int8x1"}


def test_finer_methods_need_more_rows_for_int8_to_pay(monkeypatch):
    with_products(monkeypatch, has_int8=True)
    rows = [choose_kernel("auto", METHODS[method], 384, 384).few_rows for method in ("w8a32", "w8a16", "w8a8")]
    assert rows == sorted(rows, reverse=True)


@each_method
def test_a_layer_takes_a_float_copy_below_the_rows_where_int8_pays(method, monkeypatch):
    with_products(monkeypatch, has_int8=True)
    layer = random_layer(method, 300, 400)
    rows = layer.choice.few_rows
    few = "float32" if method == "w8a32" else "float32x1"
    layer(normal(rows - 1, 400))
    assert set(layer._forms) == {few}
    layer(normal(rows, 400))
    assert set(layer._forms) == {"int8", few} or set(layer._forms) == {"int8"}


@each_method
def test_without_vnni_large_layers_hold_float16_codes(method, monkeypatch):
    with_products(monkeypatch, has_float16=True)
    small, middling, large = (choose_kernel("auto", METHODS[method], size, size).label for size in (64, 768, 1024))
    assert small == ("float32" if method == "w8a32" else "float32x1")
    if method == "w8a32":  # whose activations are to lose nothing
        assert (middling, large) == ("float32", "float16x2 to 16 rows, reference")
    else:
        assert middling == large == "float16"


@each_method
@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (4096, 4096)])
def test_without_either_the_formula_runs(method, shape, monkeypatch):
    with_products(monkeypatch)
    assert choose_kernel("auto", METHODS[method], *shape) == Choice("reference", "no fast and exact int8 product here")


def test_int8_is_int8_however_small_and_exact_sums_where_the_processor_has_none(monkeypatch):
    with_products(monkeypatch, has_int8=True)
    assert choose_kernel("int8", METHODS["w8a8"], 2, 2).kernel == "int8"
    with_products(monkeypatch, has_float16=True)
    assert choose_kernel("int8", METHODS["w8a8"], 2, 2) == Choice("exact", "no fast and exact int8 product here")


@pytest.mark.parametrize(("kernel", "instead"), [("auto", "reference"), ("int8", "exact")])
def test_sums_that_could_overflow_int32_are_refused_with_the_reason(kernel, instead, monkeypatch):
    with_products(monkeypatch, has_int8=True)
    assert choose_kernel(kernel, METHODS["w8a32"], 8, LONGEST_SUM).kernel == "int8"
    refused = choose_kernel(kernel, METHODS["w8a32"], 8, LONGEST_SUM + 1)
    assert refused == Choice(instead, f"sums over {LONGEST_SUM + 1:,} features can overflow int32")


def test_the_longest_sum_fits_int32():
    assert LONGEST_SUM * 127 * 128 < 2**31 <= (LONGEST_SUM + 2) * 127 * 128


def test_reference_is_the_reference_and_layers_without_weights_too():
    assert choose_kernel("reference", METHODS["w8a8"], 4096, 4096) == Choice("reference", "as asked for")
    assert choose_kernel("auto", METHODS["w8a8"], 0, 4096) == Choice("reference", "no weights")


@pytest.mark.parametrize("name", ["reference", "float32", "auto"])
def test_the_environment_goes_before_the_spec(name, monkeypatch):
    expected = choose_kernel("auto", METHODS["w8a32"], 9, 9) if name == "auto" else Choice(name, "as asked for")
    monkeypatch.setenv("TINYQ_KERNEL", name)
    assert choose_kernel("int8", METHODS["w8a32"], 9, 9) == expected


def test_a_typo_in_the_environment_is_named_with_what_is_allowed(monkeypatch):
    monkeypatch.setenv("TINYQ_KERNEL", "int 8")
    with pytest.raises(SpecError, match="TINYQ_KERNEL is 'int 8': it must be one of auto, int8, reference"):
        nn.Sequential(LAYERS["w8a8"](4, 4))(torch.ones(1, 4))


def test_a_layer_tells_its_choice_and_chooses_anew_when_its_kernel_is_set():
    layer = LAYERS["w8a32"](8, 8)
    assert layer.choice == choose_kernel("auto", METHODS["w8a32"], 8, 8)
    layer.kernel = "reference"
    assert layer.choice.kernel == "reference"


def test_the_environment_goes_before_a_layers_kernel_in_every_dtype(monkeypatch):
    layer, x = LAYERS["w8a8"](8, 8), torch.ones(2, 8, dtype=torch.float64)
    for asked, wanted in (("int8", "exact"), ("reference", "reference")):
        monkeypatch.setenv("TINYQ_KERNEL", asked)
        assert layer._formula_name() == wanted
        assert layer(x).shape == (2, 8)
    with pytest.raises(SpecError, match="kernel 'fast': it must be one of auto, int8, reference"):
        layer.kernel = "fast"
