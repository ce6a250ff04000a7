"""Models whose forward takes and returns whatever people write, and errors that say what to write instead."""

import dataclasses
import json
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import rnn

from tinyq_lightning import TinyQError, export, quantize
from tinyq_lightning.handover import session_forward


@dataclasses.dataclass
class Scores:
    logits: Tensor
    hidden: object = None


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Cache:
    """An object that graphs know nothing of."""


class Net(nn.Module):
    def __init__(self, function=None):
        super().__init__()
        self.layer, self.function = nn.Linear(8, 4), function

    def forward(self, x):
        return self.function(self.layer(x))


def made(model):
    torch.manual_seed(0)
    quantize(model.eval(), "w8a8")
    return model


def rows(*shape):
    return torch.randn(*(shape or (3, 8)), generator=torch.Generator().manual_seed(0))


LOADED = """
import json, sys
sys.modules.update(dict.fromkeys(("tinyq_lightning", "lightning", "transformers")))
import torch
program = torch.export.load(sys.argv[1]).module()
out = program(torch.ones(5, 8))
print(json.dumps({name: (list(each.shape) if torch.is_tensor(each) else each) for name, each in out.items()}))
"""


def test_outputs_of_own_classes_become_plain_so_that_a_file_loads_without_them(tmp_path):
    model = made(Net(lambda y: Scores(y, hidden=None)))
    report = export(model, tmp_path / "net.pt2", rows())
    assert [each.name for each in report.outputs] == ["logits"]
    done = subprocess.run([sys.executable, "-c", LOADED, tmp_path / "net.pt2"], capture_output=True, text=True)
    assert json.loads(done.stdout) == {"logits": [5, 4], "hidden": None}, done.stderr
    with torch.no_grad(), session_forward(model, tmp_path / "net.pt2"):
        out = model(rows(6, 8))
    assert isinstance(out, Scores)
    assert out.logits.shape == (6, 4)


def test_named_tuples_are_tuples_in_a_program_and_name_the_outputs(tmp_path):
    model = made(Net(lambda y: {"pair": Pair(y, y + 1), "cache": Cache()}))
    report = export(model, tmp_path / "net.pt2", rows())
    assert [each.name for each in report.outputs] == ["pair.first", "pair.second"]
    assert "not exported, since graphs do not hold such: cache (a Cache)" in report.notes
    out = torch.export.load(tmp_path / "net.pt2").module()(rows())
    assert type(out["pair"]) is tuple
    assert out["cache"] is None


def test_outputs_of_hugging_face_models_become_dicts(tmp_path):
    outputs = pytest.importorskip("transformers.modeling_outputs")
    model = made(Net(lambda y: outputs.BaseModelOutput(last_hidden_state=y)))
    export(model, tmp_path / "net.pt2", rows())
    assert type(torch.export.load(tmp_path / "net.pt2").module()(rows())) is dict


class Named(Net):
    def forward(self, x, **more):
        return self.layer(x) + sum(more.values())


@pytest.mark.parametrize("dynamic", [True, False, {"x": {0: "rows"}, "b": {0: "rows"}, "a": {0: "rows"}}])
def test_arguments_of_any_name_have_dynamic_sizes_and_their_own_names(tmp_path, dynamic):
    inputs = {"x": rows(), "b": rows(3, 4), "a": rows(3, 4)}
    report = export(made(Named()), tmp_path / "net.pt2", inputs, dynamic=dynamic)
    assert list(report.inputs[0]) == ["x", "b", "a"]
    assert len(report.inputs) == (3 if dynamic else 1)


class Packing(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 8, batch_first=True)

    def forward(self, x, lengths):
        packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]

    def unpadded(self, x):
        return self.lstm(x)[0]

    def packed(self, x):
        return self.lstm(rnn.pack_padded_sequence(x, torch.tensor([4, 2, 1]), batch_first=True))[0]

    def last(self, x, lengths):
        return self.lstm(x)[0][torch.arange(x.shape[0]), lengths - 1]


def test_packed_sequences_are_errors_that_say_what_to_write(tmp_path):
    model, x, lengths = made(Packing()), rows(3, 4, 6), torch.tensor([4, 1, 2])
    packed = rnn.pack_padded_sequence(x, torch.tensor([4, 2, 1]), batch_first=True)
    cases = [
        ("forward", (x, lengths), r"it packs sequences, at test_any_forward\.py:\d+, .*lengths - 1\]"),
        ("unpadded", packed, "the example input x of Packing.unpadded is a PackedSequence"),
        ("packed", x, "output of the model is a PackedSequence"),
    ]
    for method, inputs, message in cases:
        with pytest.raises(TinyQError, match=message):
            export(model, tmp_path / "net.pt2", inputs, method=method)
    assert not list(tmp_path.iterdir())
    report = export(model, tmp_path / "net.pt2", (x, lengths), method="last")
    assert report.relative_error < 1e-3


class Scripted(Net):
    def __init__(self):
        super().__init__()
        self.function = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))


class Holding(Net):
    def forward(self, x):
        return self.layer(x.x)


def branching(y):
    return y if y.sum() > 0 else -y


MISTAKES = [
    (Net(nn.functional.dropout), rows(), "other numbers for the same inputs each time .*training=self.training"),
    (Net(branching), rows(), r"a branch or a size from the values .*, at test_any_forward\.py:\d+"),
    (Net(lambda y: {"a.b": y, "a": {"b": y}}), rows(), "two outputs of the model would have the name 'a.b'"),
    (Net(lambda y: y), rows().to_sparse(), "the example input x of Net.forward is a sparse tensor"),
    (Net(lambda y: y), rows(0, 8), r"has the shape \[0, 8\], and nothing can be computed of no rows"),
    (Holding(), (Scores(rows()),), "the example input x of Holding.forward is a Scores, which graphs do not take"),
    (Holding(), (NamedTuple("Row", [("x", Tensor)])(rows()),), "holds a Row, whose class a file of torch.export does"),
]


@pytest.mark.parametrize(("model", "inputs", "message"), MISTAKES, ids=[each[2][:30] for each in MISTAKES])
def test_what_no_graph_can_hold_is_an_error_that_says_what_to_write(tmp_path, model, inputs, message):
    with pytest.raises(TinyQError, match=message):
        export(made(model), tmp_path / "net.pt2", inputs)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_module_is_named(tmp_path):
    with pytest.raises(TinyQError, match="function is a scripted module"):
        export(made(Scripted()), tmp_path / "net.pt2", rows())


def test_complex_numbers_are_refused_where_a_runtime_has_none(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    if not hasattr(torch.onnx, "ops"):
        pytest.skip("needs torch 2.8")
    model = made(Net(torch.fft.rfft))
    with pytest.raises(TinyQError, match=r"an output of the model is complex, .*torch\.view_as_real"):
        export(model, tmp_path / "net.onnx", rows())
    assert export(model, tmp_path / "net.pt2", rows()).relative_error < 1e-3
