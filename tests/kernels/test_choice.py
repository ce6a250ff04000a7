"""Which kernel a layer takes, and why."""

import pytest
import torch
from kernel_cases import EIGHT_BITS, each_method, normal, random_layer, with_products
from torch import nn

from tinyq_lightning.errors import SpecError
from tinyq_lightning.kernels.base import LONGEST_SUM
from tinyq_lightning.kernels.choice import Choice, choose_kernel
from tinyq_lightning.layers.linear import LAYERS
from tinyq_lightning.methods import METHODS


@each_method
def test_with_vnni_small_layers_hold_plain_codes_and_large_ones_packed_codes(method, monkeypatch):
    with_products(monkeypatch, has_plain=True, has_onednn=True)
    small, middling, large = (choose_kernel("auto", METHODS[method], size, size) for size in (384, 768, 2048))
    assert (small.kernel, middling.kernel, large.label) == ("int8", "int8", "int8-onednn")
    assert large.reason == "the processor has int8 products"
    if method != "w8a32":
        assert small.label == middling.label == "int8"
        return
    assert small.few_rows > middling.few_rows > large.few_rows == 0
    assert middling.label == f"float32 to {middling.few_rows - 1} row{'s' * (middling.few_rows > 2)}, int8"
    assert small.reason.endswith("go by a float copy in memory")


@each_method
@pytest.mark.parametrize(
    ("has", "small", "large"),
    [
        (("plain",), "int8", "int8"),
        (("onednn",), "int8-onednn", "int8-onednn"),
        (("plain", "onednn", "fbgemm"), "int8", "int8-onednn"),
    ],
)
def test_each_int8_product_will_do_alone(method, has, small, large, monkeypatch):
    with_products(monkeypatch, **{f"has_{name}": True for name in has})
    if method == "w8a8" and "fbgemm" in has:
        large = "int8-fbgemm"  # the product of one digit, by fewer operators
    for kernel in ("auto", "int8", "compact"):
        assert choose_kernel(kernel, METHODS[method], 384, 384).kernel == small
        assert choose_kernel(kernel, METHODS[method], 2048, 2048).kernel == large


@each_method
def test_with_amx_codes_are_packed_sooner_and_by_onednn_alone(method, monkeypatch):
    with_products(monkeypatch, has_plain=True, has_onednn=True, has_fbgemm=True, has_amx=True)
    labels = [choose_kernel("auto", METHODS[method], size, size).label for size in (384, 768, 2048)]
    assert labels == ["float32" if method == "w8a32" else "int8", "int8-onednn", "int8-onednn"]
    assert choose_kernel("compact", METHODS[method], 384, 384).label == "int8"


def test_one_feature_does_not_go_by_plain_codes_whose_product_is_wrong_there(monkeypatch):
    with_products(monkeypatch, has_plain=True, has_onednn=True)
    assert choose_kernel("int8", METHODS["w8a8"], 8, 1).kernel == "int8-onednn"
    with_products(monkeypatch, has_plain=True)
    assert choose_kernel("int8", METHODS["w8a8"], 8, 1) == Choice(
        "exact", "the int8 product here is wrong for one feature"
    )


def test_a_w8a32_layer_takes_a_float_copy_below_the_rows_where_int8_pays(monkeypatch):
    with_products(monkeypatch, has_plain=True)
    layer = random_layer("w8a32", 300, 400)
    rows = layer.choice.few_rows
    layer(normal(rows - 1, 400))
    assert set(layer._forms) == {"float32"}
    layer(normal(rows, 400))
    assert set(layer._forms) == {"int8", "float32"}


def test_without_vnni_w8a8_takes_digits_in_two_parts_where_nothing_else_is_as_fast_or_as_small(monkeypatch):
    with_products(monkeypatch, has_split=True, has_float16=True)
    kernels = [choose_kernel(asked, METHODS["w8a8"], 768, 768).kernel for asked in ("auto", "compact", "int8")]
    assert kernels == ["float16", "int8-split", "int8-split"]
    with_products(monkeypatch, has_split=True)
    kernels = {
        size: [choose_kernel("auto", METHODS[method], size, size).kernel for method in EIGHT_BITS]
        for size in (768, 2048)
    }
    assert kernels == {768: ["float32", "float32x1", "float32x1"], 2048: ["float32", "float32x1", "int8-split"]}


@pytest.mark.parametrize("has", ["plain", "onednn", "fbgemm", "float16", "split", None])
@each_method
@pytest.mark.parametrize("size", [64, 384, 768, 2048])
def test_compact_holds_one_byte_a_weight(method, size, has, monkeypatch):
    with_products(monkeypatch, **({f"has_{has}": True} if has else {}))
    assert choose_kernel("compact", METHODS[method], size, size).bytes_a_weight == 1


def test_what_a_layer_holds_for_each_weight_is_what_its_forms_take(monkeypatch):
    with_products(monkeypatch, has_plain=True, has_onednn=True, has_float16=True)
    held = [choose_kernel("auto", METHODS[method], 384, 384).bytes_a_weight for method in EIGHT_BITS]
    assert held == [5, 1, 1]  # a float copy beside the codes
    with_products(monkeypatch, has_float16=True)
    held = [choose_kernel("auto", METHODS[method], 2048, 2048).bytes_a_weight for method in EIGHT_BITS]
    assert held == [3, 2, 2]


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
def test_without_either_layers_hold_a_float_copy_or_the_formula_runs(method, shape, monkeypatch):
    with_products(monkeypatch)
    lacking = "no fast and exact int8 product here"
    copied = Choice(
        "float32" if method == "w8a32" else "float32x1", f"{lacking}: a float copy in memory; the file stays small"
    )
    assert choose_kernel("auto", METHODS[method], *shape) == copied
    assert choose_kernel("compact", METHODS[method], *shape) == Choice("reference", lacking)


def test_int8_is_int8_however_small_and_exact_sums_where_the_processor_has_none(monkeypatch):
    with_products(monkeypatch, has_plain=True)
    assert choose_kernel("int8", METHODS["w8a8"], 2, 2).kernel == "int8"
    with_products(monkeypatch, has_float16=True)
    assert choose_kernel("int8", METHODS["w8a8"], 2, 2) == Choice("exact", "no fast and exact int8 product here")


@pytest.mark.parametrize(("kernel", "instead"), [("compact", "reference"), ("int8", "exact")])
def test_sums_that_could_overflow_int32_are_refused_with_the_reason(kernel, instead, monkeypatch):
    with_products(monkeypatch, has_plain=True, has_onednn=True)
    assert choose_kernel(kernel, METHODS["w8a32"], 8, LONGEST_SUM).kernel == "int8-onednn"
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
    with pytest.raises(SpecError, match="TINYQ_KERNEL is 'int 8': it must be one of auto, compact, int8, reference"):
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
    with pytest.raises(SpecError, match="kernel 'fast': it must be one of auto, compact, int8, reference"):
        layer.kernel = "fast"


@pytest.mark.parametrize("size", [384, 768, 2048])
def test_layers_of_four_bits_take_the_kernels_of_those_of_eight(size):
    for method in EIGHT_BITS:
        four = METHODS[method.replace("w8", "w4")]
        for kernel in ("auto", "int8", "reference"):
            assert choose_kernel(kernel, four, size, size) == choose_kernel(kernel, METHODS[method], size, size)
        compact = choose_kernel("compact", four, size, size)
        assert (compact.kernel, compact.bytes_a_weight) == ("int4", 0.52)


def test_only_four_bits_are_expanded_on_each_call(monkeypatch):
    monkeypatch.setenv("TINYQ_KERNEL", "int4")
    assert [choose_kernel("auto", METHODS[method], 64, 64).kernel for method in ("w4a8", "w8a8")] == [
        "int4",
        "reference",
    ]
