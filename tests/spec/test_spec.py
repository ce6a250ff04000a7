"""The spec: YAML, overrides, merging, round trips, and errors that quote the text and its line."""

import re
from dataclasses import replace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn

from tinyq_lightning import QuantizationSpec, quantize
from tinyq_lightning.errors import SpecError
from tinyq_lightning.methods import METHODS
from tinyq_lightning.spec import METHOD_NAMES, Budget, Rule, Save, as_spec, wanted_method
from tinyq_lightning.spec.matching import pattern_matches
from tinyq_lightning.spec.reader import nearest

FULL = """\
method: w8a16
exclude: [head, "encoder.*"]
rules:
  - match: "layers.*.linear2"
    method: w8a8
  - match: "re:decoder\\\\.(0|1)\\\\..*"
    method: float
    reason: it hurts
when: test_start
weights: last
kernel: int8
non_finite: float
budget: {monitor: val_acc, mode: max, max_drop: "1%"}
save: {dirpath: out, filename: small}
"""
FULL_SPEC = QuantizationSpec(
    method="w8a16",
    exclude=("head", "encoder.*"),
    rules=(Rule("layers.*.linear2", "w8a8"), Rule(r"re:decoder\.(0|1)\..*", "float", "it hurts")),
    when="test_start",
    weights="last",
    kernel="int8",
    non_finite="float",
    budget=Budget("val_acc", "max", "1%"),
    save=Save("out", "small"),
)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a YAML file into the working folder and return its name."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="spec.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return name

    return write


# --- reading ---


def test_every_key_of_the_yaml_is_read(write):
    assert QuantizationSpec.from_yaml(write(FULL)) == FULL_SPEC


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_an_empty_file_is_the_default_and_a_warning_says_so(write, text):
    with pytest.warns(UserWarning, match=r"the file is empty, so it leaves all at the default, method: w8a32") as told:
        assert QuantizationSpec.from_yaml(write(text)) == QuantizationSpec()
    assert told[0].filename == __file__


@pytest.mark.parametrize("text", ["{}", "exclude:\nrules:\nbudget:\nsave:\n"])
def test_keys_left_out_or_left_empty_have_their_defaults(write, text):
    spec = QuantizationSpec.from_yaml(write(text))
    assert spec == QuantizationSpec() == QuantizationSpec.from_dict({})
    assert (spec.method, spec.when, spec.weights, spec.kernel) == ("w8a32", "fit_end", "best", "auto")
    assert (spec.non_finite, spec.budget, spec.save, spec.exclude, spec.rules) == ("error", None, Save(), (), ())


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_name_is_read(method):
    assert QuantizationSpec.from_dict({"method": method}).method == method


def test_numbers_as_patterns_are_the_leaf_names_of_a_sequential(write):
    assert QuantizationSpec.from_yaml(write("exclude: [0, 12]")).exclude == ("0", "12")


def test_interpolation_is_omegaconfs(write, monkeypatch):
    monkeypatch.setenv("TINYQ_TEST_METHOD", "w8a8")
    text = "method: ${oc.env:TINYQ_TEST_METHOD}\nrules:\n- {match: a, method: '${method}'}\n"
    text += "exclude: ['${weights}.b']\nweights: best\n"
    spec = QuantizationSpec.from_yaml(write(text))
    assert spec.method == "w8a8"
    assert spec.rules == (Rule("a", "w8a8"),)
    assert spec.exclude == ("best.b",)


def test_interpolation_works_in_a_mapping():
    assert QuantizationSpec.from_dict(
        {"exclude": ["a"], "rules": [{"match": "b", "method": "${method}"}], "method": "w8a8"}
    ).rules == (Rule("b", "w8a8"),)


def test_yaml_anchors_work(write):
    text = "rules:\n- &first {match: a, method: w8a8}\n- {<<: *first, match: b}\n"
    assert QuantizationSpec.from_yaml(write(text)).rules == (Rule("a", "w8a8"), Rule("b", "w8a8"))


# --- overrides ---

BASE = "method: w8a32\nexclude:\n- p\n- q\nrules:\n- match: a\n  method: w8a8\n"


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("method=w8a16", "method", "w8a16"),
        ("exclude=[a,b]", "exclude", ("a", "b")),
        ("exclude=[]", "exclude", ()),
        ("exclude.1=z", "exclude", ("p", "z")),
        ("rules.0.method=float", "rules", (Rule("a", "float"),)),
        ("rules[0].method=float", "rules", (Rule("a", "float"),)),
        ("rules=[{match: x.*.y, method: w8a16}]", "rules", (Rule("x.*.y", "w8a16"),)),
        ("rules=[]", "rules", ()),
        ("save.filename=small", "save", Save(None, "small")),
        ("budget={monitor: m, mode: min, max_drop: 0.5}", "budget", Budget("m", "min", 0.5)),
        ("weights=current", "weights", "current"),
        ("rules.0.method=${method}", "rules", (Rule("a", "w8a32"),)),
    ],
)
def test_an_override_sets_one_key(write, override, field, value):
    spec = QuantizationSpec.from_yaml(write(BASE), [override])
    assert getattr(spec, field) == value
    untouched = QuantizationSpec.from_yaml("spec.yaml").to_dict()
    assert {k: v for k, v in spec.to_dict().items() if k != field} == {k: v for k, v in untouched.items() if k != field}


def test_later_overrides_win_and_build_on_the_earlier(write):
    budget = ["budget.monitor=val_acc", "budget.mode=max", "budget.max_drop=1%"]
    spec = QuantizationSpec.from_yaml(write(BASE), ["method=w8a8", *budget, "method=w8a16"])
    assert spec.method == "w8a16"
    assert spec.budget == Budget("val_acc", "max", "1%")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method", "write it as key=value"),
        ("=w8a8", "write it as key=value"),
        ("metod=w8a8", "Did you mean 'method'"),
        ("method=w8a9", "'w8a9' is not a method. Did you mean 'w8a8'"),
        ("method=", "is not a method"),
        ("rules.0.method=flot", "'flot' is not a method. Did you mean 'float'"),
        ("rules.0.methd=float", "Did you mean 'method'"),
        ("rules.7.method=float", "rules"),
        ("rules.x=1", "rules"),
        ("exclude=head", "must be a list, not 'head': write [head]"),
        ("exclude=[a", "exclude"),
        ("exclude=[a,true]", "must be text, not bool True"),
        ("method=${nope}", "nope"),
        ("method=${", "method"),
        ("rules.0={match: q, method: fl}", "'fl' is not a method"),
        ("save.filename=last", "'last'"),
    ],
)
def test_a_wrong_override_is_quoted_in_the_error(write, override, said):
    with pytest.raises(SpecError, match=re.escape(said)) as caught:
        QuantizationSpec.from_yaml(write(BASE), [override])
    assert f"override {override!r}" in str(caught.value)


# --- several files ---


def test_later_files_are_merged_over_the_earlier(write):
    first = write("method: w8a8\nexclude: [a]\nsave: {dirpath: out}\n", "first.yaml")
    second = write("method: w8a16\nsave: {filename: small}\nkernel: int8\n", "second.yaml")
    spec = QuantizationSpec.from_yaml([first, second], ["kernel=reference"])
    expected = QuantizationSpec("w8a16", ("a",), kernel="reference", save=Save("out", "small"))
    assert spec == expected


def test_errors_name_the_file_of_several_that_is_wrong(write):
    first = write("kernel: int8\nmethod: w8a9\n", "first.yaml")
    second = write("\n\nweights: bst\n", "second.yaml")
    with pytest.raises(SpecError, match=r"first\.yaml:2 \(method\): 'w8a9'"):
        QuantizationSpec.from_yaml([first, second])
    with pytest.raises(SpecError, match=r"second\.yaml:3 \(weights\): 'bst' .*Did you mean 'best'"):
        QuantizationSpec.from_yaml([first, second], ["method=w8a8"])
    with pytest.raises(SpecError, match="override 'weights=wurst'"):
        QuantizationSpec.from_yaml([first, second], ["method=w8a8", "weights=wurst"])


# --- errors quote the text, the file, the line and the nearest name ---


@pytest.mark.parametrize(
    ("text", "line", "key", "said"),
    [
        ("weights: best\nmetod: w8a8", 2, "metod", "unknown key 'metod'. Did you mean 'method'?"),
        ("method: w8a9", 1, "method", "'w8a9' is not a method. Did you mean 'w8a8'? Choose from: w8a32"),
        ("method: [w8a8, w8a9]", 1, "method.1", "'w8a9' is not a method. Did you mean 'w8a8'?"),
        ("method:", 1, "method", "None is not a method"),
        ("\nwhen: fit_ende", 2, "when", "'fit_ende' is not a value of when. Did you mean 'fit_end'?"),
        ("weights: bests", 1, "weights", "'bests' is not a value of weights. Did you mean 'best'"),
        ("kernel: int", 1, "kernel", "'int' is not a value of kernel. Did you mean 'int8'?"),
        ("non_finite: eror", 1, "non_finite", "'eror' is not a value of non_finite. Did you mean 'error'?"),
        ("exclude: head", 1, "exclude", "must be a list, not 'head': write [head]"),
        ("exclude:\n- a\n- true", 3, "exclude.1", "must be text, not bool True: put it in quotes"),
        ("exclude:\n- a\n- 1.5", 3, "exclude.1", "must be text, not float 1.5"),
        ("exclude: ['']", 1, "exclude.0", "must be text, not ''"),
        ("exclude:\n- 're:('", 2, "exclude.0", "'re:(' is not a regular expression: missing )"),
        ("rules: {match: a}", 1, "rules", "must be a list, not dict"),
        ("rules:\n- a", 2, "rules.0", "must be a mapping with the keys match, method, reason, decided_by, not 'a'"),
        ("rules:\n- match: a", 2, "rules.0", "the key 'method' is missing"),
        ("rules:\n- method: w8a8", 2, "rules.0", "the key 'match' is missing"),
        ("rules:\n- match: a\n  method: w8a23", 3, "rules.0.method", "'w8a23' is not a method. Did you mean 'w8a32'"),
        ("rules:\n- match: a\n  methods: w8a8", 3, "rules.0.methods", "unknown key 'methods'. Did you mean 'method'?"),
        ("rules:\n- match: 're:['\n  method: w8a8", 2, "rules.0.match", "'re:[' is not a regular expression"),
        ("rules:\n- {match: a, method: w8a8, reason: [b]}", 2, "rules.0.reason", "must be text, not list ['b']"),
        ("save: here", 1, "save", "must be a mapping with the keys dirpath, filename, not 'here'"),
        ("save: false", 1, "save", "must be a mapping with the keys dirpath, filename, not bool False"),
        ("save: []", 1, "save", "must be a mapping with the keys dirpath, filename, not list []"),
        ("save:\n  dirname: a", 2, "save.dirname", "unknown key 'dirname'. Did you mean "),
        ("save:\n  dirpath: 3", 2, "save.dirpath", "dirpath must be text, not int 3"),
        ("save:\n  filename: a/b", 2, "save.filename", "'a/b' must be a name without folders"),
        ("save:\n  filename: last.ckpt", 2, "save.filename", "'last.ckpt' is one that ckpt_path='last' would pick up"),
        ("save:\n  filename: last-v1", 2, "save.filename", "'last-v1' is one that ckpt_path='last' would pick up"),
        (
            "budget: 0.5",
            1,
            "budget",
            "must be a mapping with the keys monitor, mode, max_drop, max_evals, max_seconds, ladder, not",
        ),
        ("budget:\n  monitor: a\n  mode: max", 1, "budget", "the key 'max_drop' is missing"),
        ("budget:\n  monitor: a\n  mode: mix\n  max_drop: 1", 3, "budget.mode", "'mix' is not a mode. Did you mean "),
        ("budget:\n  monitor: 3\n  mode: max\n  max_drop: 1", 2, "budget.monitor", "monitor must be text, not int 3"),
        ("budget:\n  monitor: a\n  mode: max\n  max_drop: -1", 4, "budget.max_drop", "not int -1"),
        ("budget:\n  monitor: a\n  mode: max\n  max_drop: .nan", 4, "budget.max_drop", "not float nan"),
        ("budget:\n  monitor: a\n  mode: max\n  max_drop: true", 4, "budget.max_drop", "not bool True"),
        ("budget:\n  monitor: a\n  mode: max\n  max_drop: 1 percent", 4, "budget.max_drop", "not '1 percent'"),
        ("budget:\n  monitor: a\n  mode: max\n  max_drop: 1..2%", 4, "budget.max_drop", "not '1..2%'"),
        ("budget:\n  monitor: a\n  mode: max\n  max_drop: .%", 4, "budget.max_drop", "not '.%'"),
        ("weights: best\nmethod: ${nope}", 2, "method", "nope"),
        ("weights: best\nmethod: ${method}", 2, "method", "Recursive interpolation"),
        ("weights: best\nmethod: ${oc.env:TINYQ_NOT_SET}", 2, "method", "TINYQ_NOT_SET"),
        ("weights: best\nrules:\n- match: a\n  method: ${nope", 4, "rules.0.method", "${nope"),
    ],
)
def test_an_error_says_file_line_key_text_and_nearest_name(write, text, line, key, said):
    with pytest.raises(SpecError) as caught:
        QuantizationSpec.from_yaml(write(text))
    message = str(caught.value)
    assert message.startswith(f"spec.yaml:{line} ({key}): ")
    assert said in message


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("method: w8a8\n\tweights: best", 2),
        ("method: a: b", 1),
        ("exclude: [a\nrules: b", 2),
        ("method: w8a8\nmethod: w8a16", 2),
        ("- method", 1),
        ("w8a8", 1),
        ("method: w8a8\n---\nmethod: w8a8", 2),
        ("method: *nowhere", 1),
    ],
)
def test_a_file_that_is_no_mapping_in_yaml_is_refused_with_file_and_line(write, text, line):
    with pytest.raises(SpecError, match=rf"^spec\.yaml:{line}: "):
        QuantizationSpec.from_yaml(write(text))


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path, said in (
        (tmp_path / "none.yaml", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "binary.yaml", "not UTF-8"),
    ):
        with pytest.raises(SpecError, match=said) as caught:
            QuantizationSpec.from_yaml(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(("override", "index"), [("exclude=[a,b]", 0), ("exclude=[a,b]", 1)])
def test_a_list_set_by_an_override_is_no_longer_placed_in_the_file(write, override, index):
    spec = QuantizationSpec.from_yaml(write(BASE), [override])
    assert spec.origin.where("exclude", index) == f"override {override!r} (exclude.{index})"
    assert spec.origin.where("rules", 0, "match") == "spec.yaml:6 (rules.0.match)"


def test_a_list_set_by_a_later_file_is_placed_there(write):
    spec = QuantizationSpec.from_yaml([write(BASE), write("\nrules:\n- {match: x, method: float}\n", "second.yaml")])
    assert spec.origin.where("rules", 0, "match") == "second.yaml:3 (rules.0.match)"
    assert spec.origin.where("exclude", 1) == "spec.yaml:4 (exclude.1)"


def test_errors_of_a_mapping_name_the_key():
    with pytest.raises(SpecError, match=r"^spec \(rules\.0\.method\): 'w8' is not a method"):
        QuantizationSpec.from_dict({"rules": [{"match": "a", "method": "w8"}]})


@pytest.mark.parametrize("value", [None, 3, "w8a32", ["method"], object()])
def test_from_dict_refuses_what_is_no_mapping(value):
    with pytest.raises(SpecError, match="mapping"):
        QuantizationSpec.from_dict(value)


def test_from_yaml_refuses_no_file_at_all():
    with pytest.raises(SpecError, match=r"\w+"):
        QuantizationSpec.from_yaml([])


def test_an_object_that_is_no_plain_data_is_refused_with_its_key():
    with pytest.raises(SpecError, match="method"):
        QuantizationSpec.from_dict({"method": object()})


def test_a_spec_made_by_hand_is_checked_too():
    with pytest.raises(SpecError, match=r"'w8a9' is not a method\. Did you mean 'w8a8'"):
        quantize(nn.Sequential(nn.Linear(2, 2)), QuantizationSpec(method="w8a9"))


def test_nearest_names_what_is_near_and_nothing_else():
    assert nearest("w8a33", METHOD_NAMES) == " Did you mean 'w8a32'?"
    assert nearest("zzz", METHOD_NAMES) == ""
    assert nearest("aab", ["aaa", "aac", "x"], 2) == " Did you mean 'aac' or 'aaa'?"


# --- as_spec ---


def test_a_spec_is_made_from_a_method_a_path_a_mapping_or_a_spec(write):
    path = write(FULL)
    assert as_spec("w8a8") == QuantizationSpec("w8a8")
    assert as_spec(path) == as_spec(yaml.safe_load(FULL)) == as_spec(OmegaConf.create(FULL)) == FULL_SPEC
    assert as_spec(FULL_SPEC) == FULL_SPEC
    assert as_spec({"exclude": ("a", "b")}).exclude == ("a", "b")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("w8a33", "'w8a33' is not a method. Did you mean 'w8a32'?"),
        ("nothing.yaml", "nothing.yaml: the spec cannot be read: No such file"),
        ("", "'' is not a method"),
        (8, "not int"),
        (None, "not NoneType"),
    ],
)
def test_what_is_no_spec_is_refused(value, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=re.escape(said)):
        as_spec(value)


# --- round trips ---

text = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12).filter(
    lambda value: "${" not in value  # OmegaConf's interpolation
)
patterns = text.filter(lambda value: not value.startswith("re:")) | st.sampled_from(
    [
        "re:.*",
        r"re:decoder\.(0|1)\..*",
        "a.*.b",
        "???",
        "yes",
        "null",
        "012",
        "1e5",
        "1_0",
        "~",
        "0x1f",
        "#a",
        "- a",
        "a: b",
    ]
)
specs = st.builds(
    lambda methods, **keys: QuantizationSpec(method=methods[0], methods=methods if len(methods) > 1 else (), **keys),
    methods=st.sampled_from(METHOD_NAMES).map(lambda method: (method,))
    | st.lists(st.sampled_from(list(METHODS)), min_size=2, unique=True).map(tuple),
    keep=st.sampled_from(["all", "smallest"]),
    exclude=st.lists(patterns, max_size=3).map(tuple),
    rules=st.lists(st.builds(Rule, patterns, st.sampled_from(METHOD_NAMES), st.none() | text), max_size=3).map(tuple),
    when=st.sampled_from(["fit_end", "test_start"]),
    weights=st.sampled_from(["best", "last", "current"]),
    kernel=st.sampled_from(["auto", "int8", "reference"]),
    non_finite=st.sampled_from(["error", "float"]),
    budget=st.none()
    | st.builds(
        Budget,
        text,
        st.sampled_from(["min", "max", None]),
        st.floats(0, 1e6) | st.integers(0, 100) | st.floats(0, 100).map(lambda x: f"{x:.3f}%"),
        st.none() | st.integers(1, 100),
        st.none() | st.floats(0.1, 1e6),
    ),
    save=st.builds(Save, st.none() | text, st.none() | st.sampled_from(["small", "a=1-b", "12", "lasting"])),
)


@given(specs)
@settings(deadline=None, max_examples=60)
def test_to_yaml_and_from_yaml_give_the_same_spec_back(tmp_path_factory, spec):
    path = tmp_path_factory.mktemp("specs") / "spec.yaml"
    written = spec.to_yaml(path)
    assert path.read_text(encoding="utf-8") == written == spec.to_yaml()
    assert QuantizationSpec.from_yaml(path) == spec


@given(specs)
@settings(deadline=None, max_examples=60)
def test_to_dict_and_from_dict_give_the_same_spec_back(spec):
    assert QuantizationSpec.from_dict(spec.to_dict()) == spec
    assert yaml.safe_load(yaml.safe_dump(spec.to_dict())) == spec.to_dict()  # plain data


def test_a_spec_is_frozen():
    with pytest.raises(AttributeError):
        QuantizationSpec().method = "w8a8"


# --- patterns ---


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("head", "model.lm_head", False),
        ("encoder", "encoder.layers.0", True),
        ("encoder", "my.encoder.0", False),  # a leaf name, or a path from the top
        ("encoder.layers.1", "encoder.layers.1.linear2", True),
        ("encoder.layers.1", "encoder.layers.10.linear2", False),
        ("layers.0", "encoder.layers.0", False),
        ("encoder.layers.*.linear2", "encoder.layers.3.linear2", True),
        ("encoder.layers.*.linear2", "encoder.layers.3.linear1", False),
        ("*.linear2", "encoder.layers.3.linear2", True),
        ("*.linear2", "linear2", False),
        ("encoder.*", "encoder.layers.3.linear2", True),
        ("encoder.layers.?", "encoder.layers.3.linear2", True),
        ("encoder.layers.[01]", "encoder.layers.1.linear2", True),
        ("encoder.layers.[!01]", "encoder.layers.1.linear2", False),
        ("*attn*", "blocks.0.attn.q", True),
        ("*", "anything.at.all", True),
        ("Encoder", "encoder", False),
        ("0", "net.0", True),
        ("0", "net.10", False),
        ("re:net", "net.0", False),  # in full
        (r"re:net\.\d+", "net.10", True),
        (r"re:net\.\d", "net.10", False),
        ("re:.*(q|k)_proj", "layers.0.attn.k_proj", True),
        ("re:(?i)NET.*", "net.0", True),
        ("re:", "net", False),
    ],
)
def test_pattern_covers_leaf_names_paths_what_is_below_globs_and_expressions(pattern, name, matches):
    assert pattern_matches(pattern, name) is matches


names = st.lists(st.from_regex(r"[a-z_0-9]{1,4}", fullmatch=True), min_size=1, max_size=5)


@given(names, st.data())
def test_every_path_covers_itself_and_all_below_and_its_leaf(parts, data):
    length = data.draw(st.integers(1, len(parts)))
    assert pattern_matches(".".join(parts[:length]), ".".join(parts))
    assert pattern_matches(parts[-1], ".".join(parts))
    assert pattern_matches("re:" + re.escape(".".join(parts)), ".".join(parts))
    starred = [*parts]
    starred[data.draw(st.integers(0, len(parts) - 1))] = "*"
    assert pattern_matches(".".join(starred), ".".join(parts))


# --- who decided ---


def test_a_rule_that_a_run_wrote_says_what_it_was_decided_by(write):
    text = "rules:\n- {match: a, method: float, reason: it hurts, decided_by: budget}\n- {match: b, method: float}\n"
    spec = QuantizationSpec.from_yaml(write(text))
    assert [rule.decided_by for rule in spec.rules] == ["budget", "rule"]
    assert QuantizationSpec.from_dict(spec.to_dict()) == spec
    assert [rule.get("decided_by") for rule in spec.to_dict()["rules"]] == ["budget", None]
    assert wanted_method(spec, ["a"]) == ("float", "it hurts", "budget")
    assert wanted_method(spec, ["b"]) == ("float", "rule 2", "rule")
    assert wanted_method(spec, ["c"]) == ("w8a32", "spec", "spec")


@pytest.mark.parametrize(
    ("reason", "by"),
    [
        ("budget: output SQNR 3.1 dB in w8a8; acc lost 0.1, now loses nothing", "budget"),
        ("left float: int8 took 1.31x the time of float at 8 rows, measured here", "timing"),
        ("it hurts", "rule"),
        (None, "rule"),
    ],
)
def test_rules_of_earlier_files_tell_by_their_reasons(reason, by):
    spec = QuantizationSpec.from_dict({"rules": [{"match": "a", "method": "float", "reason": reason}]})
    assert spec.rules[0].decided_by == by


def test_what_decided_is_one_of_three():
    with pytest.raises(SpecError, match=r"rules\.0\.decided_by\): 'budgets' .*Did you mean 'budget'"):
        QuantizationSpec.from_dict({"rules": [{"match": "a", "method": "float", "decided_by": "budgets"}]})


# --- checked once, as it is made ---


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: QuantizationSpec("w8a9"), "Did you mean 'w8a8'"),
        (lambda: QuantizationSpec(weights="bst"), "Did you mean 'best'"),
        (lambda: QuantizationSpec(methods=("w8a8", "w8a8")), "in the list twice"),
        (lambda: QuantizationSpec(rules=(Rule("re:[", "w8a8"),)), "not a regular expression"),
        (lambda: QuantizationSpec(budget=Budget("acc", "max", "much")), "max_drop must be"),
        (lambda: QuantizationSpec(save=Save(None, "last")), "ckpt_path='last'"),
        (lambda: replace(QuantizationSpec(), kernel="int"), "Did you mean 'int8'"),
    ],
)
def test_no_spec_is_made_that_is_wrong(make, said):
    with pytest.raises(SpecError, match=re.escape(said)):
        make()


def test_a_spec_stands_for_itself():
    spec = QuantizationSpec(exclude=[0, "head"])
    assert as_spec(spec) is spec
    assert spec.exclude == ("0", "head")


def test_a_spec_made_by_hand_is_checked_as_one_that_is_read():
    for wrong in ({"rules": [{"match": "a", "method": "float"}]}, {"budget": {"monitor": "a", "max_drop": 1}}):
        with pytest.raises(SpecError, match="from_dict takes mappings"):
            QuantizationSpec(**wrong)
    assert QuantizationSpec(methods=("w8a8", "w8a16")).method == "w8a8"


def test_a_reason_that_begins_like_a_budgets_does_not_make_it_one():
    rules = [{"match": "a", "method": "float", "reason": "budget meeting said so"}]
    assert QuantizationSpec.from_dict({"rules": rules}).rules[0].decided_by == "rule"
