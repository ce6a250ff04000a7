"""Programs of torch.export and AOTInductor packages: every kind of layer, any size, without this package."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conv_nets import UNet, resnet18
from exported_nets import needs_onnx
from lightning.pytorch import LightningModule
from mixed import RULE, Mixed
from models import FEATURES
from torch import nn
from transformer import LENGTH, WORDS, Language

from tinyq_lightning import export, quantize
from tinyq_lightning.errors import ExportError
from tinyq_lightning.handover import recorded_calls, session_forward

METHODS = ("w8a32", "w8a16", "w8a8")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


class Padded(nn.Module):
    """A transformer encoder that is told which tokens are padding, and returns a dict."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 16, padding_idx=0)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, ids, padding):
        hidden = self.encoder(self.embed(ids), src_key_padding_mask=padding)
        return {"hidden": hidden, "logits": self.head(hidden[:, 0]), "word": ids.argmax(1)}

    def encode(self, ids, padding):
        return self.encoder(self.embed(ids), src_key_padding_mask=padding).mean(1)


class States(nn.Module):
    """Takes and returns the states of its recurrent layers."""

    def __init__(self):
        super().__init__()
        self.lstm, self.gru = nn.LSTM(6, 8, 2, batch_first=True), nn.GRU(8, 5, batch_first=True, bidirectional=True)

    def forward(self, batch):
        out, states = self.lstm(batch["series"])
        return self.gru(out)[0], states


def padded_inputs():
    ids = torch.randint(1, 30, (3, 9))
    ids[1, 5:] = 0
    return ids, ids == 0


TOKENS = {0: "batch", 1: "tokens"}
CASES = {
    "mixed": (Mixed, lambda: torch.randn(3, FEATURES), True),
    "tied": (Language, lambda: torch.randint(WORDS, (3, LENGTH)), TOKENS),
    "padded": (Padded, padded_inputs, TOKENS),
    "resnet": (lambda: resnet18(8, 10), lambda: torch.randn(2, 3, 32, 32), True),
    "unet": (UNet, lambda: torch.randn(2, 1, 32, 32), True),
    "states": (States, lambda: ({"series": torch.randn(3, 7, 6)},), True),
}


def case(name, method):
    torch.manual_seed(0)
    make, inputs, dynamic = CASES[name]
    model = make().eval()
    spec = {"method": method, "rules": [RULE | {"method": "w8a32"}]} if name == "mixed" else method
    quantize(model, spec)
    return model, inputs(), dynamic


def slow_but(name, methods):
    """Each method with a case; those not listed in long test runs only."""
    return [pytest.param(name, each, marks=[] if each in methods else pytest.mark.slow) for each in METHODS]


EACH = [
    pair
    for name in CASES
    for pair in slow_but(name, METHODS if name == "padded" else ("w8a8",) if name != "resnet" else ())
]


@pytest.mark.parametrize(("name", "method"), EACH)
def test_a_program_computes_what_the_model_does(name, method, tmp_path):
    model, inputs, dynamic = case(name, method)
    report = export(model, tmp_path / "net.pt2", inputs, dynamic=dynamic)
    assert report.relative_error < 1e-3
    assert len(report.inputs) == 3
    held = torch.export.load(tmp_path / "net.pt2")
    tensors = [*held.state_dict.values(), *held.constants.values()]
    codes = [tensor for tensor in tensors if tensor.dtype == torch.int8]
    assert codes
    assert len({id(tensor) for tensor in codes}) == len(codes)
    assert not [node for node in held.graph.nodes if "tinyq" in str(node.target)]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_a_package_computes_what_the_model_does(name, method, tmp_path):
    model, inputs, dynamic = case(name, method)
    report = export(model, tmp_path / "net.pt2", inputs, to="aoti", dynamic=dynamic)
    assert report.relative_error < 5e-3
    assert "machine code" in report.notes[0]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("method", ["w8a32", "w8a8"])
def test_a_package_holds_int8_codes_also_of_what_it_multiplies_as_floats(method, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 1024, 5), nn.Flatten(), nn.Linear(4096, 257))
    held = sum(each.numel() for each in model.parameters())
    quantize(model.eval(), method)
    report = export(model, tmp_path / "net.pt2", torch.randn(3, 3, 8, 8), to="aoti")
    assert report.relative_error < 5e-3
    assert (tmp_path / "net.pt2").stat().st_size < 2 * held  # floats take four bytes; the machine code takes some


WITHOUT = """
import importlib.abc, json, sys

class Refusing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("tinyq_lightning", "lightning", "pytorch_lightning"):
            raise ImportError(name)

sys.meta_path.insert(0, Refusing())
import torch
case = torch.load("case.pt")
if sys.argv[1] == "aoti":
    run = torch._inductor.aoti_load_package("net.pt2")
else:
    run = torch.export.load("net.pt2").module()
with torch.no_grad():
    out = run(*case["inputs"])
torch.testing.assert_close(out, case["wanted"], rtol=2e-3, atol=2e-3)
rows = [each[:1].contiguous() for each in case["inputs"]]
with torch.no_grad():
    torch.testing.assert_close(run(*rows), {name: each[:1] for name, each in out.items()}, rtol=2e-3, atol=2e-3)
"""


@pytest.mark.parametrize("format", ["pt2", pytest.param("aoti", marks=[needs_compiler, pytest.mark.slow])])
def test_a_process_without_this_package_runs_it(format, tmp_path):
    model, inputs, dynamic = case("padded", "w8a32")
    with torch.no_grad():
        wanted = model(*inputs)
    export(model, tmp_path / "net.pt2", inputs, to=format, dynamic=dynamic)
    torch.save({"inputs": list(inputs), "wanted": wanted}, tmp_path / "case.pt")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT, format], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_method_is_exported_by_name(tmp_path):
    model, inputs, dynamic = case("padded", "w8a8")
    report = export(model, tmp_path / "net.pt2", inputs, method="encode", dynamic=dynamic)
    with torch.no_grad():
        out = torch.export.load(tmp_path / "net.pt2").module()(*inputs)
        torch.testing.assert_close(out, model.encode(*inputs), rtol=1e-3, atol=1e-3)
    assert [each.name for each in report.outputs] == ["output"]


def test_outputs_have_the_names_of_the_models(tmp_path):
    model, inputs, _ = case("states", "w8a32")
    report = export(model, tmp_path / "net.pt2", inputs, dynamic=False)
    assert [each.name for each in report.outputs] == ["output_0", "output_1.0", "output_1.1"]
    assert report.inputs == ({"batch.series": (3, 7, 6)},)
    model, inputs, _ = case("padded", "w8a32")
    report = export(model, tmp_path / "other.pt2", {"ids": inputs[0], "padding": inputs[1]})
    assert [each.name for each in report.outputs] == ["hidden", "logits", "word"]
    assert list(report.inputs[0]) == ["ids", "padding"]


class WithExample(LightningModule):
    def __init__(self):
        super().__init__()
        self.example_input_array = torch.randn(1, 8)
        self.layer = nn.Linear(8, 4)

    def forward(self, x):
        return self.layer(x)


def test_the_example_of_a_lightning_module_is_taken_and_one_row_does(tmp_path):
    model = WithExample()
    quantize(model, "w8a8")
    report = export(model, tmp_path / "net.pt2")
    assert [each["x"] for each in report.inputs] == [(1, 8), (1, 8), (4, 8)]
    run = torch.export.load(tmp_path / "net.pt2").module()
    assert run(torch.randn(17, 8)).shape == (17, 4)


@pytest.mark.parametrize(
    ("dynamic", "tried"),
    [({0: "n"}, [(1, 8), (1, 8), (4, 8)]), ({0: torch.export.Dim("n", min=1, max=3)}, [(1, 8), (1, 8), (3, 8)])],
)
def test_one_row_of_a_dimension_of_any_name_is_compared_with_more_rows(tmp_path, dynamic, tried):
    model = nn.Sequential(nn.Linear(8, 4))
    quantize(model, "w8a8")
    report = export(model, tmp_path / "net.pt2", torch.randn(1, 8), dynamic=dynamic)
    assert [each["input"] for each in report.inputs] == tried


def test_one_place_of_a_further_dimension_is_compared_with_more(tmp_path):
    model = nn.Sequential(nn.Linear(8, 4))
    quantize(model, "w8a8")
    report = export(model, tmp_path / "net.pt2", torch.randn(2, 1, 8), dynamic={0: "batch", 1: "steps"})
    assert [each["input"] for each in report.inputs] == [(2, 1, 8), (1, 4, 8), (5, 4, 8)]


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x, scale=None):
        return self.layer(x) if scale is None else self.layer(x) * scale


def test_a_program_in_the_place_of_forward_takes_arguments_by_name_and_by_place(tmp_path):
    model, x, scale = Scaled(), torch.randn(3, 8), torch.tensor(2.0)
    quantize(model, "w8a8")
    export(model, tmp_path / "net.pt2", {"x": x, "scale": scale})
    with torch.no_grad(), session_forward(model, tmp_path / "net.pt2"):
        outs = model(x, scale), model(x, scale=scale), model(scale=scale, x=x)
    for out in outs:
        torch.testing.assert_close(out, model(x, scale))


class Many(nn.Module):
    """Takes any number of arguments by place."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, *xs):
        return self.layer(sum(xs))


class Named(Many):
    """Takes any number of arguments by name."""

    def forward(self, x, **more):
        return self.layer(x) + sum(more.values())


@pytest.mark.parametrize(("model", "dynamic"), [(Many, True), (Many, False), (Named, False)])
def test_a_model_of_any_arguments_is_exported(tmp_path, model, dynamic):
    x, y, net = torch.randn(3, 8), torch.randn(3, 4), model()
    quantize(net, "w8a8")
    inputs = (x, x) if model is Many else {"x": x, "b": y, "a": y}
    assert export(net, tmp_path / "net.pt2", inputs, dynamic=dynamic).relative_error < 1e-3


def test_calls_are_noted_by_the_names_that_they_give():
    x, y, net = torch.randn(3, 8), torch.randn(3, 4), Named()
    with recorded_calls(net) as calls, torch.no_grad():
        net(x, b=y)
        net(x)
    assert [[*call] if isinstance(call, dict) else len(call) for call in calls] == [["x", "b"], 1]


class Returning(nn.Module):
    """Returns its input, one tensor twice, nothing, and if asked text; changes an input; and may take a branch."""

    def __init__(self, text="", branches=False):
        super().__init__()
        self.layer, self.text, self.branches = nn.Linear(8, 4), text, branches

    def forward(self, x, y):
        out = self.layer(x) + y.add_(1)
        if self.branches and out.sum() > 0:
            out = -out
        return {"x": x, "outs": (out, [out, None])} | ({"text": self.text} if self.text else {})


@pytest.mark.parametrize("ending", ["pt2", pytest.param("onnx", marks=needs_onnx)])
def test_inputs_may_be_returned_and_changed(tmp_path, ending):
    model = Returning()
    quantize(model, "w8a8")
    y = torch.zeros(3, 4)
    report = export(model, tmp_path / f"net.{ending}", (torch.randn(3, 8), y))
    assert report.relative_error < 1e-4
    assert [each.name for each in report.outputs] == ["x", "outs.0", "outs.1.0"]
    assert torch.equal(y, torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("given", "message"), [({"text": "scores"}, "returns the text 'scores'"), ({"branches": True}, "torch.where")]
)
def test_what_no_program_can_hold_is_an_error_in_words(tmp_path, capfd, given, message):
    model = Returning(**given)
    quantize(model, "w8a8")
    with pytest.raises(ExportError, match=message):
        export(model, tmp_path / "net.pt2", (torch.randn(3, 8), torch.zeros(3, 4)))
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr().err == ""


def test_sizes_that_are_not_dynamic_are_fixed(tmp_path):
    model, inputs, _ = case("padded", "w8a32")
    export(model, tmp_path / "net.pt2", inputs)
    run = torch.export.load(tmp_path / "net.pt2").module()
    with pytest.raises((AssertionError, RuntimeError)):
        run(inputs[0][:, :4].contiguous(), inputs[1][:, :4].contiguous())


def test_bounds_are_held(tmp_path):
    model, inputs, _ = case("padded", "w8a32")
    tokens = torch.export.Dim("tokens", min=2, max=20)
    export(model, tmp_path / "net.pt2", inputs, dynamic={0: "batch", 1: tokens})
    run = torch.export.load(tmp_path / "net.pt2").module()
    with torch.no_grad():
        assert run(torch.ones(1, 20).long(), torch.zeros(1, 20).bool())["logits"].shape == (1, 3)
    with pytest.raises((AssertionError, RuntimeError)):
        run(torch.ones(1, 21).long(), torch.zeros(1, 21).bool())


class Fixed(nn.Module):
    """Works for one batch size only."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x):
        return self.layer(x).reshape(2, 2, 4) if len(x) == 4 else self.layer(x)


def test_a_size_that_cannot_change_is_an_error_that_says_what_to_do(tmp_path):
    model = Fixed()
    quantize(model, "w8a32")
    with pytest.raises(ExportError, match="If the sizes of batch may not change, give dynamic=False"):
        export(model, tmp_path / "net.pt2", torch.randn(4, 8))
    assert not list(tmp_path.iterdir())
    export(model, tmp_path / "net.pt2", torch.randn(4, 8), dynamic=False)


@needs_compiler
def test_a_package_takes_int8_products_where_a_program_has_the_formula(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64))
    quantize(model, "w8a8")
    export(model, tmp_path / "net.pt2", torch.randn(4, 64))
    program = torch.export.load(tmp_path / "net.pt2")
    assert "_int_mm" not in str(program.graph)
    model[0].kernel = "int8"
    export(model, tmp_path / "int8.pt2", torch.randn(4, 64))
    asked = "_int_mm" in str(torch.export.load(tmp_path / "int8.pt2").graph)
    assert asked == model[0].choice.kernel.startswith("int8")


def test_without_a_compiler_there_is_an_error_that_says_so(tmp_path):
    from torch._inductor import config

    model, inputs, _ = case("padded", "w8a32")
    missing = config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with missing, pytest.raises(ExportError, match="there is no C\\+\\+ compiler: install one"):
        export(model, tmp_path / "net.pt2", inputs, to="aoti")
    assert not list(tmp_path.iterdir())


def test_a_package_is_named_as_torch_wants_it(tmp_path):
    model, inputs, _ = case("padded", "w8a32")
    with pytest.raises(ExportError, match=r"only if its name ends in \.pt2"):
        export(model, tmp_path / "net.so", inputs, to="aoti")


def test_the_report_is_json(tmp_path):
    model, inputs, _ = case("padded", "w8a32")
    assert json.loads(json.dumps(export(model, tmp_path / "net.pt2", inputs).to_dict()))["format"] == "pt2"
