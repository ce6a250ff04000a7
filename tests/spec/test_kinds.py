"""Which kinds of layer a spec is about: what may be written, what it does, and what old specs mean."""

import pytest
import torch
import yaml
from torch import nn

from tinyq_lightning import (
    QuantizationSpec,
    Quantizer,
    TinyQCallback,
    W8A16LinearLayer,
    quantize,
    replace_linear_with_target_and_quantize,
)
from tinyq_lightning.errors import ModelError, SpecError
from tinyq_lightning.layers.embedding import QuantizedEmbedding
from tinyq_lightning.methods import KIND_NAMES
from tinyq_lightning.spec import as_spec


class Net(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.words, self.places = nn.Embedding(12, 8), nn.Embedding(6, 8)
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(self.body(self.words(x) + self.places(x)))


def decided(plan):
    return {decision.name: (decision.method, decision.reason) for decision in plan}


@pytest.mark.parametrize("given", ["all", list(KIND_NAMES), list(reversed(KIND_NAMES))])
def test_all_kinds_are_the_default(given):
    assert as_spec({"kinds": given}) == QuantizationSpec() == as_spec("w8a32")
    assert as_spec({"kinds": given}).to_dict()["kinds"] == "all"


def test_kinds_are_kept_in_one_order_and_written_back():
    spec = as_spec({"kinds": ["embedding", "linear"]})
    assert spec.to_dict()["kinds"] == ["linear", "embedding"]
    assert as_spec(spec.to_dict()) == spec
    assert TinyQCallback(kinds=["embedding"]).spec.kinds == ("embedding",)
    assert TinyQCallback(spec, kinds="all").spec.kinds == KIND_NAMES


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kinds: [linear, embeding]", r"spec.yaml:2 \(kinds.1\): 'embeding' is not a kind. Did you mean 'embedding'"),
        ("kinds: [conv, conv]", r"\(kinds.1\): 'conv' is in the list twice"),
        ("kinds: linear", r"\(kinds\): kinds must be a list, not 'linear': write \[linear\]"),
        ("kinds: lineer", r"\(kinds\): 'lineer' is not a kind. Did you mean 'linear'\? Choose from: all, linear"),
        ("kinds: []", r"\(kinds\): the list of kinds is empty. Write all, or choose from: linear"),
        ("kinds: {linear: true}", r"\(kinds\): kinds must be a list, not dict"),
        ("kinds: [1]", r"\(kinds.0\): int 1 is not a kind"),
        ("kind: all", r"unknown key 'kind'. Did you mean 'kinds'"),
    ],
)
def test_what_is_no_list_of_kinds_is_refused_with_its_line(tmp_path, text, said):
    path = tmp_path / "spec.yaml"
    path.write_text(f"method: w8a8\n{text}\n")
    with pytest.raises(SpecError, match=said):
        QuantizationSpec.from_yaml(path)


def test_layers_of_other_kinds_stay_float_and_the_plan_says_so():
    assert decided(quantize(Net(), {"kinds": ["embedding"]})) == {
        "words": ("w8a32", "spec"),
        "places": ("w8a32", "spec"),
        "body": ("float", "kind linear is switched off"),
        "head": ("float", "kind linear is switched off"),
    }


def test_a_rule_for_all_does_not_switch_a_kind_on():
    found = decided(quantize(Net(), {"kinds": ["linear"], "rules": [{"match": "*", "method": "w8a8"}]}))
    assert found["places"] == ("float", "kind embedding is switched off")
    assert found["head"] == ("w8a8", "rule 1")


@pytest.mark.parametrize("kinds", [["linear"], ["embedding"]])
def test_a_layer_that_shares_its_weight_goes_with_the_kind_that_is_on(kinds):
    model = Net(tied=True)
    found = decided(quantize(model, {"kinds": kinds}))
    follower, leader = ("words", "head") if kinds == ["linear"] else ("head", "words")
    assert found[leader] == ("w8a32", "spec")
    assert found[follower] == ("w8a32", f"tied to {leader}.weight")
    assert model.head.int8_weights is model.words.int8_weights


def test_what_a_rule_names_is_what_it_says_if_its_kind_is_on():
    rules = [{"match": "places", "method": "float", "reason": "small"}, {"match": "*", "method": "w8a8"}]
    found = decided(quantize(Net(), {"method": "w8a16", "rules": rules}))
    assert found == {
        "words": ("w8a32", "rule 2; a look-up has no activations"),
        "places": ("float", "small"),
        "body": ("w8a8", "rule 2"),
        "head": ("w8a8", "rule 2"),
    }


@pytest.mark.parametrize("keys", [{"exclude": ["places"]}, {"rules": [{"match": "places", "method": "w8a32"}]}])
def test_a_pattern_for_layers_that_are_switched_off_is_an_error_that_says_so(tmp_path, keys):
    with pytest.raises(SpecError, match=r"'places' matches only layers of a kind that is switched off \(embedding\)"):
        quantize(Net(), {"kinds": ["linear"]} | keys)


def test_a_model_without_a_layer_of_these_kinds_is_refused():
    with pytest.raises(ModelError, match=r"Net has no layer of the kinds conv to quantize \(it has some of embedding"):
        quantize(Net(), {"kinds": ["conv"]})


def test_a_plan_with_kinds_gives_the_same_plan_again():
    spec = {"method": "w8a8", "kinds": ["embedding", "linear"], "exclude": ["body"]}
    plan = quantize(Net(), spec)
    assert plan.label == "w8a8", "embeddings do not make it a mixed one"
    again = quantize(Net(), plan.to_spec())
    assert decided(again) == decided(plan)
    assert again.spec.kinds == ("linear", "embedding")


def test_a_spec_that_an_earlier_version_resolved_means_what_it_meant_with_a_warning(tmp_path):
    content = as_spec("w8a8").to_dict()
    del content["kinds"]
    model = Net(tied=True)
    with pytest.warns(
        UserWarning, match=r"^spec: .* layers of other kinds stay float. Write kinds: \[linear, attention\]"
    ):
        found = decided(quantize(model, content))
    assert found["places"] == ("float", "kind embedding is switched off")
    assert found["words"] == ("w8a32", "tied to head.weight; a look-up has no activations")
    assert isinstance(model.words, QuantizedEmbedding)
    del content["budget"]  # as in the YAML that a run leaves
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.warns(UserWarning, match=r"spec.yaml: .*, or kinds: all$"):
        assert as_spec(path).kinds == ("linear", "attention")


def test_quantizer_leaves_all_but_linears():
    model = Net()
    Quantizer(model).quantize("w8a32")
    assert type(model.places) is type(model.words) is nn.Embedding
    assert model.body.int8_weights.dtype == torch.int8
    with pytest.raises(ModelError, match="no layer of the kinds linear, attention"):
        Quantizer(nn.Sequential(nn.Embedding(3, 8))).quantize()
    with pytest.raises(ModelError, match=r"put it in an nn\.Sequential$"):
        Quantizer(nn.Embedding(3, 8)).quantize()


def test_a_pattern_for_what_is_never_replaced_is_refused_in_the_words_of_the_tutorial():
    said = (
        r"pattern 'words' .*of a kind that stays float here anyway \(embedding\), such as 'words': remove the pattern$"
    )
    with pytest.raises(SpecError, match=r"^module_not_to_quantize \(exclude.0\): " + said):
        Quantizer(Net()).quantize("w8a32", ["words"])
    with pytest.raises(SpecError, match=r"^module_name_to_exclude \(exclude.1\): " + said):
        replace_linear_with_target_and_quantize(Net(), W8A16LinearLayer, ["body", "words"])
