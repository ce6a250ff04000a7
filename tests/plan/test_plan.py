"""The plan: every layer with its method and why, patterns that are checked, and a spec that reproduces it."""

import re
from dataclasses import replace

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from tinyq_lightning import QuantizationSpec, Quantizer, quantize
from tinyq_lightning.errors import ModelError, SpecError
from tinyq_lightning.layers.quantized_layer import QuantizedLayer
from tinyq_lightning.plan.checks import check_patterns
from tinyq_lightning.plan.plan import Plan
from tinyq_lightning.plan.resolution import resolve
from tinyq_lightning.plan.sites import find_sites
from tinyq_lightning.spec import METHOD_NAMES


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.linear1, self.linear2 = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return x + self.linear2(self.linear1(self.norm(x)))


class Net(nn.Module):
    """An embedding, two blocks and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})
        self.head = nn.Linear(4, 10, bias=False)

    def forward(self, x):
        x = self.embed(x)
        for block in self.encoder["layers"]:
            x = block(x)
        return self.head(x)


class Tied(Net):
    def __init__(self):
        super().__init__()
        self.head.weight = self.embed.weight


NAMES = ["embed"] + [f"encoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)] + ["head"]


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A subclass that computes what nn.Linear does."""


def spec(**keys):
    return QuantizationSpec.from_dict(keys)


def decisions(model, **keys):
    return {d.name: (d.method, d.reason) for d in resolve(spec(**keys), model)}


def from_file(tmp_path, text):
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    return QuantizationSpec.from_yaml(path)


# --- every layer, its method, and why ---


def test_every_layer_appears_once_in_the_order_of_the_modules():
    plan = resolve(spec(), Net())
    assert [d.name for d in plan] == NAMES
    assert len(plan) == 6
    assert [d.kind for d in plan] == ["embedding", *["linear"] * 5]
    assert {(d.method, d.reason) for d in plan} == {("w8a32", "spec")}


def test_reasons_are_spec_rule_and_excluded():
    rules = [{"match": "encoder.layers.0.*", "method": "w8a8"}, {"match": "re:.*linear2", "method": "w8a16"}]
    assert decisions(Net(), exclude=["head"], rules=rules) == {
        "embed": ("w8a32", "spec"),
        NAMES[1]: ("w8a8", "rule 1"),
        NAMES[2]: ("w8a8", "rule 1"),
        NAMES[3]: ("w8a32", "spec"),
        NAMES[4]: ("w8a16", "rule 2"),
        "head": ("float", "excluded"),
    }


def test_a_rule_may_give_its_own_reason_and_leave_layers_float():
    rules = [{"match": "head", "method": "float", "reason": "it hurts"}]
    assert decisions(Net(), rules=rules)["head"] == ("float", "it hurts")


def test_exclude_wins_over_rules_and_the_first_rule_over_the_next():
    rules = [{"match": "*.linear1", "method": "w8a8"}, {"match": "encoder", "method": "w8a16"}]
    found = decisions(Net(), exclude=["encoder.layers.0"], rules=rules)
    assert [found[name] for name in NAMES] == [
        ("w8a32", "spec"),
        ("float", "excluded"),
        ("float", "excluded"),
        ("w8a8", "rule 1"),
        ("w8a16", "rule 2"),
        ("w8a32", "spec"),
    ]


def test_exclude_takes_whole_paths_and_what_is_below_and_not_leaf_names_only():
    # the sixth fault of the tutorial
    model = nn.ModuleDict({"a": nn.ModuleDict({"fc": nn.Linear(2, 2)}), "b": nn.ModuleDict({"fc": nn.Linear(2, 2)})})
    assert decisions(model, exclude=["a.fc"]) == {"a.fc": ("float", "excluded"), "b.fc": ("w8a32", "spec")}
    assert decisions(model, exclude=["a"]) == {"a.fc": ("float", "excluded"), "b.fc": ("w8a32", "spec")}


@pytest.mark.parametrize(
    "asked",
    [
        {"rules": [{"match": "embed", "method": "float"}, {"match": "head", "method": "w8a8"}]},
        {"rules": [{"match": "embed", "method": "w8a32"}, {"match": "head", "method": "float"}]},
        {"exclude": ["embed"], "rules": [{"match": "head", "method": "w8a16"}]},
    ],
)
def test_entries_that_name_both_ends_of_a_tie_and_contradict_each_other_are_refused(asked):
    with pytest.raises(SpecError, match=r"embed and head have the same weight|head and embed have the same weight"):
        resolve(QuantizationSpec.from_dict(asked), Tied())


def test_a_glob_that_covers_a_tied_layer_is_overruled_with_the_reason():
    model = Tied()
    plan = resolve(spec(exclude=["embed"], rules=[{"match": "h*", "method": "w8a16"}]), model)
    reasons = {decision.name: decision.reason for decision in plan}
    assert reasons["head"] == "tied to embed.weight (excluded), against rule 1"


def test_kinds_that_the_model_has_none_of_are_refused_with_the_line(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("method: w8a32\nkinds: [conv]\n")
    with pytest.raises(ModelError, match=r"spec\.yaml:2 \(kinds\): Net has no layer of the kinds conv"):
        resolve(QuantizationSpec.from_yaml(path), Net())


def test_copies_for_speed_are_said_with_the_kernel_that_has_none():
    plan = resolve(QuantizationSpec(), Net())
    copies = any(each.memory_bytes > each.bytes for each in plan)
    assert (" of it copies for speed (none with kernel: compact); as floats " in plan.memory_note()) == copies
    assert "copies" not in resolve(spec(kernel="compact"), Net()).memory_note()


def test_an_embedding_tied_to_a_linear_is_in_the_plan_and_names_its_other_end():
    # the fifth fault of the tutorial
    model = Net()
    model.head.weight = model.embed.weight
    assert decisions(model)["embed"] == ("w8a32", "tied to head.weight")
    pair = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    pair["b"].weight = pair["a"].weight
    assert [d.tied_to for d in resolve(QuantizationSpec(), pair)] == [None, "a", None]


def test_a_shared_bias_does_not_keep_a_layer_float():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].bias = model[0].bias
    assert decisions(model) == {"0": ("w8a32", "spec"), "1": ("w8a32", "spec")}


def test_a_subclass_with_a_forward_of_its_own_stays_float_and_one_without_does_not():
    model = nn.Sequential(Doubling(2, 2), Renamed(2, 2))
    assert decisions(model) == {"0": ("float", "Doubling has a forward of its own"), "1": ("w8a32", "spec")}


def test_a_forward_replaced_on_the_instance_stays_float():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].forward = lambda x: x
    assert decisions(model)["0"] == ("float", "its forward was replaced")


def test_weights_that_are_computed_are_quantized_and_the_plan_says_what_is_fixed():
    model = nn.Sequential(nn.Linear(4, 4), parametrizations.weight_norm(nn.Linear(4, 4)))
    prune.random_unstructured(model[0], "weight", amount=0.5)
    assert decisions(model) == {
        "0": (
            "w8a32",
            "spec; its weight is fixed as RandomUnstructured computes it from weight_orig, weight_mask",
        ),
        "1": ("w8a32", "spec"),
    }


def test_quantized_layers_are_left_and_said():
    model = Net()
    quantize(model, {"rules": [{"match": "head", "method": "w8a8"}]})
    assert decisions(model)["head"] == ("w8a8", "already quantized")
    layers = list(model.modules())
    quantize(model, "w8a16")
    assert all(a is b for a, b in zip(model.modules(), layers, strict=True))


def test_a_layer_under_several_names_appears_once_with_its_aliases():
    model = Net()
    model.again = model.head
    model.encoder["layers"].append(model.encoder["layers"][0])
    plan = resolve(spec(), model)
    assert [d.name for d in plan] == NAMES
    aliases = {d.name: d.aliases for d in plan}
    assert aliases["head"] == ("again",)
    assert aliases[NAMES[1]] == ("encoder.layers.2.linear1",)
    assert aliases[NAMES[3]] == ()


def test_a_pattern_on_any_name_of_a_shared_layer_decides():
    model = Net()
    model.again = model.head
    assert decisions(model, exclude=["again"])["head"] == ("float", "excluded")
    assert decisions(model, rules=[{"match": "again", "method": "w8a8"}])["head"] == ("w8a8", "rule 1")


def test_torch_compiles_wrapper_is_no_level_of_its_names():
    model = torch.compile(Net(), backend="eager")
    assert [d.name for d in resolve(spec(exclude=["head"]), model)] == NAMES


def test_module_lists_and_dicts_and_a_child_that_holds_its_parent_are_walked():
    model = nn.ModuleDict({"list": nn.ModuleList([nn.Linear(2, 2)]), "dict": nn.ModuleDict({"x": nn.Linear(2, 2)})})
    child = nn.Module()
    child.up, child.fc, child.none = model, nn.Linear(2, 2), None
    model["child"] = child
    assert [site.name for site in find_sites(model)] == ["list.0", "dict.x", "child.fc"]


# --- weights that have no value, or a bad one ---


def test_non_finite_weights_are_refused_by_name_and_count():
    model = Net()
    with torch.no_grad():
        model.head.weight[0, :3] = torch.nan
        model.encoder["layers"][0].linear1.weight[1, 1] = torch.inf
    with pytest.raises(ModelError) as caught:
        resolve(spec(), model)
    for said in (f"{NAMES[1]}: 1 of 24", "head: 3 of 40", "non_finite: float"):
        assert said in str(caught.value)


def test_non_finite_float_leaves_them_float_with_the_reason():
    model = Net()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    found = decisions(model, non_finite="float")
    assert found.pop("head") == ("float", "non-finite weights")
    assert set(found.values()) == {("w8a32", "spec")}


def test_non_finite_weights_that_stay_float_anyway_are_no_error():
    model = Net()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    assert decisions(model, exclude=["head"])["head"] == ("float", "excluded")


def test_weights_whose_sum_overflows_are_finite():
    model = nn.Sequential(nn.Linear(4, 4))
    nn.init.constant_(model[0].weight, 3e38)
    assert decisions(model) == {"0": ("w8a32", "spec")}


def test_float64_weights_beyond_float32_are_refused():
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.float64))
    nn.init.constant_(model[0].weight, 1e39)
    with pytest.raises(ModelError, match="0: 16 of 16"):
        resolve(spec(), model)


def test_a_lazy_linear_is_refused_by_name_until_it_is_materialized():
    model = nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(2))
    with pytest.raises(ModelError, match=r"^1: .*LazyLinear.* run one batch"):
        resolve(spec(), model)
    model(torch.ones(1, 2))
    assert decisions(model)["1"] == ("w8a32", "spec")


def test_a_lazy_linear_may_be_excluded():
    model = nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(2))
    assert decisions(model, exclude=["1"])["1"] == ("float", "excluded")


def test_a_meta_weight_is_refused_by_name_and_may_be_excluded():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ModelError, match=r"^1: .*meta device"):
        resolve(spec(), model)
    assert decisions(model, exclude=["1"])["1"] == ("float", "excluded")


def test_a_weight_that_is_not_floating_point_stays_as_it_is_with_the_reason():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.complex64))
    assert decisions(model)["1"] == ("float", "its weight is complex64")
    assert decisions(model, exclude=["1"])["1"] == ("float", "excluded")


def test_a_model_without_a_layer_is_refused_and_says_what_it_has():
    with pytest.raises(ModelError, match=r"Sequential has no layer to quantize \(it has 1 BatchNorm2d\)"):
        resolve(spec(), nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()))
    with pytest.raises(ModelError, match=r"it has no layers\)$"):
        resolve(spec(), nn.ReLU())


class Splines(nn.Module):
    """Holds its weight beside a submodule, as layers of splines (KAN) do."""

    def __init__(self):
        super().__init__()
        self.coefficients, self.activation = nn.Parameter(torch.ones(4, 4)), nn.SiLU()


def test_a_model_whose_layers_have_submodules_is_told_of_them_and_of_rules_for_parameters():
    model = nn.Sequential(Splines(), Splines())
    with pytest.raises(ModelError, match=r"it has 2 Splines\)\. A rule may name a parameter: match: 0\.coefficients"):
        resolve(spec(), model)
    assert decisions(model, rules=[{"match": "0.coefficients", "method": "w8a32"}])["0.coefficients"][0] == "w8a32"


@pytest.mark.parametrize("training", [True, False])
def test_resolving_changes_nothing_not_even_the_buffers_of_spectral_norm(training):
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(40, 30)), nn.Linear(30, 4)).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    resolve(spec(), model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert parametrize.is_parametrized(model[0], "weight")
    assert all(module.training is training for module in model.modules())


# --- patterns are checked, with the nearest layer and the line ---


def test_an_exclude_that_matches_nothing_names_the_nearest_layer_and_the_line(tmp_path):
    wrong = from_file(tmp_path, "exclude:\n- head\n- encoder.layers.0.linaer1\n")
    with pytest.raises(SpecError) as caught:
        resolve(wrong, Net())
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'spec.yaml'}:3 (exclude.1): ")
    assert "pattern 'encoder.layers.0.linaer1' matches no layer" in message
    assert "Did you mean 'encoder.layers.0.linear1'" in message


def test_a_rule_that_matches_nothing_names_the_nearest_layer_and_the_line(tmp_path):
    wrong = from_file(tmp_path, "rules:\n- method: w8a8\n  match: haed\n")
    with pytest.raises(SpecError) as caught:
        resolve(wrong, Net())
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'spec.yaml'}:3 (rules.0.match): pattern 'haed' matches no layer")
    assert "Did you mean 'head'" in message


def test_a_pattern_far_from_every_layer_gets_the_list_of_layers():
    with pytest.raises(SpecError, match=re.escape("The layers are: " + ", ".join(NAMES))):
        resolve(spec(exclude=["xyz"]), Net())


def test_a_pattern_for_what_is_no_layer_says_what_that_is():
    with pytest.raises(SpecError, match=r"'encoder.layers.0.norm' is there, but .*: its type is LayerNorm\."):
        resolve(spec(exclude=["norm"]), Net())


def test_a_name_in_the_middle_of_paths_is_answered_with_the_glob_that_covers_it():
    with pytest.raises(SpecError, match=re.escape("write '*.layers'")):
        resolve(spec(exclude=["layers"]), Net())


def test_a_glob_and_an_expression_that_match_nothing_are_refused():
    for pattern in ("encoder.*.linear3", "re:linear1", "Head"):
        with pytest.raises(SpecError, match=re.escape(repr(pattern))):
            resolve(spec(exclude=[pattern]), Net())


def test_a_rule_shadowed_by_a_rule_names_both_a_layer_and_the_line(tmp_path):
    text = "rules:\n- {match: encoder, method: w8a8}\n- {match: '*.linear1', method: float}\n"
    with pytest.raises(SpecError) as caught:
        resolve(from_file(tmp_path, text), Net())
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'spec.yaml'}:3 (rules.1.match): rule 2 ('*.linear1') is shadowed")
    assert f"{NAMES[1]!r}, is taken by rule 1 before it" in message


def test_a_rule_shadowed_by_exclude_names_the_pattern(tmp_path):
    text = "exclude: ['*.linear1']\nrules:\n- match: encoder.layers.0.linear1\n  method: w8a8\n"
    with pytest.raises(SpecError, match=r"spec\.yaml:3 .*rule 1 .* is taken by exclude '\*\.linear1'"):
        resolve(from_file(tmp_path, text), Net())


def test_a_rule_shadowed_in_part_is_no_error():
    rules = [{"match": "encoder.layers.0", "method": "w8a8"}, {"match": "encoder", "method": "w8a16"}]
    assert decisions(Net(), rules=rules)[NAMES[3]] == ("w8a16", "rule 2")


@pytest.mark.parametrize(
    ("keys", "entry"),
    [
        ({"method": "float"}, r"\(method\): 'float' leaves all 6 layers float"),
        ({"exclude": ["*"]}, r"\(exclude\.0\): '\*' leaves all 6 layers float"),
        ({"rules": [{"match": "*", "method": "float"}]}, r"\(rules\.0\.match\): rule 1 \('\*': float\) leaves all 6"),
        (
            {"exclude": ["head"], "rules": [{"match": "re:.*", "method": "float"}]},
            r"leaves all 6 layers float, .*: rule 1 \('re:\.\*': float\) at .*, 'head' at spec \(exclude\.0\)",
        ),
    ],
)
def test_a_spec_that_leaves_everything_float_is_refused_by_the_entry_that_does(keys, entry):
    with pytest.raises(SpecError, match=entry):
        resolve(spec(**keys), Net())


def test_the_tutorials_argument_is_named_if_it_leaves_everything_float():
    with pytest.raises(SpecError, match=r"module_not_to_quantize \(exclude\.0\): '\*' leaves all 5 layers float"):
        Quantizer(Net()).quantize(module_not_to_quantize=["*"])


def test_patterns_are_checked_without_a_look_at_any_weight():
    model = Net().to("meta")
    check_patterns(spec(exclude=["head"]), model)
    with pytest.raises(SpecError, match="haed"):
        check_patterns(spec(exclude=["haed"]), model)


# --- sizes, table, label ---


def test_sizes_are_those_of_the_tensors():
    model = Net().to(torch.bfloat16)
    planned = {d.name: d for d in resolve(spec(exclude=["head"]), model)}
    layer, head = planned[NAMES[1]], planned["head"]
    assert (layer.float_bytes, layer.bytes) == (2 * (24 + 6), 24 + 4 * 6 + 2 * 6)
    assert head.float_bytes == head.bytes == 2 * 40
    done = quantize(model, spec(exclude=["head"]))
    for decision in done:
        module = model.get_submodule(decision.name)
        assert sum(t.numel() * t.element_size() for t in module.state_dict().values()) == decision.bytes


def test_table_has_a_line_for_each_layer_and_the_totals_and_why_the_kernels():
    model = Net()
    plan = quantize(model, {"exclude": ["head"], "kernel": "reference"})
    *lines, look_ups, note, memory, covered = plan.table().splitlines()
    assert lines[0].split() == ["layer", "kind", "method", "reason", "kernel", "SQNR", "dB", "float", "now"]
    assert [line.split()[0] for line in lines[2:-1]] == NAMES
    assert lines[-1].startswith("6 layers")
    embed, first = plan.decisions[:2]
    assert lines[2].split()[1:6] == ["embedding", "w8a32", "spec", "reference", f"{embed.weight_sqnr_db:.1f}"]
    assert lines[3].split()[1:6] == ["linear", "w8a32", "spec", "reference", f"{first.weight_sqnr_db:.1f}"]
    assert "excluded" in lines[7]
    total = sum(d.float_bytes for d in plan)
    assert f"{total} B" in lines[-1]
    assert look_ups.startswith("kernel reference: the rows that are needed")
    assert note == "kernel reference: as asked for"
    assert memory.startswith("in memory, once called: ")
    assert covered.startswith("73.6 % of the weight bytes in int8 (w8a32), 5 of 6 layers; in float 18.9 % Linear, ")


def test_the_plan_records_the_kernel_of_each_layer_and_why(monkeypatch):
    model = Net()
    resolved = resolve(spec(exclude=["head"]), model)
    done = quantize(model, spec(exclude=["head"]))
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    assert [d.kernel for d in resolved] == [d.kernel for d in done] == [*(layer.choice for layer in layers), None]
    assert [d.kernel for d in resolve(spec(exclude=["head"]), model)] == [d.kernel for d in done]
    # not in files: those are the same on every machine
    assert all("kernel" not in row for row in done.to_list())
    monkeypatch.setenv("TINYQ_KERNEL", "reference")
    elsewhere = resolve(spec(exclude=["head"]), Net())
    assert elsewhere.decisions[1].kernel.kernel == "reference"
    assert elsewhere == resolved


def test_sqnr_is_none_until_quantized_and_for_float_layers():
    model = Net()
    assert all(d.weight_sqnr_db is None for d in resolve(spec(), model))
    done = quantize(model, {"exclude": ["head"]})
    assert [d.weight_sqnr_db is None for d in done] == [False] * 5 + [True]


def test_label_is_the_method_or_mixed():
    assert resolve(spec(method="w8a8", exclude=["head"]), Net()).label == "w8a8"
    assert resolve(spec(rules=[{"match": "head", "method": "w8a8"}]), Net()).label == "mixed"
    assert resolve(spec(method="float", rules=[{"match": "head", "method": "w8a8"}]), Net()).label == "w8a8"


def test_to_list_is_plain_data():
    items = resolve(spec(), Net()).to_list()
    assert yaml.safe_load(yaml.safe_dump(items)) == items
    assert items[0]["name"] == NAMES[0]


# --- to_spec reproduces the plan ---

choices = st.fixed_dictionaries(
    {
        "method": st.sampled_from(METHOD_NAMES[:3]),
        "exclude": st.lists(st.sampled_from(["head", "encoder.layers.0", "*.linear2"]), max_size=2, unique=True),
        "rules": st.lists(
            st.fixed_dictionaries(
                {
                    "match": st.sampled_from(["encoder.layers.1", "re:.*linear1", "head", "encoder"]),
                    "method": st.sampled_from(METHOD_NAMES),
                }
            ),
            max_size=2,
        ),
        "non_finite": st.just("float"),
    }
)


def reproduced(plan, model, tmp_path):
    path = tmp_path / "resolved.yaml"
    plan.to_spec().to_yaml(path)
    return resolve(QuantizationSpec.from_yaml(path), model)


@given(choices, st.sets(st.sampled_from(NAMES)))
@settings(deadline=None, max_examples=80)
def test_to_spec_reproduces_what_was_asked_for_and_what_a_search_decided(tmp_path_factory, keys, reverted):
    model = Net()
    with torch.no_grad():
        model.encoder["layers"][1].linear2.weight[0] = torch.nan
    try:
        plan = resolve(spec(**keys), model)
    except SpecError:
        return  # shadowed, or nothing left
    changed = [
        replace(d, method="float", reason="budget: costs 0.01", bytes=d.float_bytes, decided_by="budget")
        if d.name in reverted and d.method != "float"
        else d
        for d in plan
    ]
    if all(d.method == "float" for d in changed):
        return  # the next test
    searched = Plan(tuple(changed), plan.spec)
    again = reproduced(searched, model, tmp_path_factory.mktemp("plan"))
    assert again.decisions == searched.decisions


def test_to_spec_reproduces_a_plan_whose_rule_was_overruled_by_the_search(tmp_path):
    model = Net()
    plan = resolve(spec(rules=[{"match": "head", "method": "w8a8"}]), model)
    reverted = replace(plan.decisions[-1], method="float", reason="budget: costs 0.01", decided_by="budget")
    searched = Plan((*plan.decisions[:-1], replace(reverted, bytes=reverted.float_bytes)), plan.spec)
    assert reproduced(searched, model, tmp_path).decisions == searched.decisions


def test_to_spec_reproduces_a_plan_of_rules_with_equal_reasons(tmp_path):
    rules = [{"match": name, "method": "w8a8", "reason": "as wide as the other"} for name in ("head", "*.linear2")]
    plan, model = resolve(spec(rules=rules), Net()), Net()
    reverted = replace(plan.decisions[-1], method="float", reason="budget: costs 0.01", decided_by="budget")
    searched = Plan((*plan.decisions[:-1], replace(reverted, bytes=reverted.float_bytes)), plan.spec)
    assert reproduced(searched, model, tmp_path).decisions == searched.decisions
    assert [rule.match for rule in searched.to_spec().rules] == ["re:head", "*.linear2"]


def test_to_spec_reproduces_a_plan_that_a_search_left_all_float(tmp_path):
    model = Net()
    plan = resolve(spec(), model)
    changed = [
        replace(d, method="float", reason="budget: costs 0.01", bytes=d.float_bytes, decided_by="budget") for d in plan
    ]
    searched = Plan(tuple(changed), plan.spec)
    assert reproduced(searched, model, tmp_path).decisions == searched.decisions


def test_to_spec_has_no_budget_and_keeps_the_rest(tmp_path):
    asked = spec(
        method="w8a8",
        kernel="int8",
        exclude=["head"],
        budget={"monitor": "a", "mode": "max", "max_drop": 0.1},
        save={"filename": "small"},
    )
    written = resolve(asked, Net()).to_spec()
    assert written == replace(asked, budget=None)


def test_to_spec_gives_the_same_bits_when_run_again(tmp_path):
    torch.manual_seed(0)
    first = Net()
    second = Net()
    second.load_state_dict(first.state_dict())
    plan = quantize(first, spec(method="w8a16", exclude=["head"], rules=[{"match": "*.linear2", "method": "w8a8"}]))
    assert quantize(second, plan.to_spec()) == plan
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
