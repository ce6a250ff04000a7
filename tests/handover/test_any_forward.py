"""Models whose forward takes and returns whatever people write, and errors that say what to write instead."""

import collections
import dataclasses
import gc
import heapq
import json
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from exported_nets import needs_onnx
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


@pytest.mark.slow
def test_a_file_loads_without_the_classes_that_the_model_returned(tmp_path):
    export(made(Net(lambda y: Scores(y, hidden=None))), tmp_path / "net.pt2", rows())
    done = subprocess.run([sys.executable, "-c", LOADED, tmp_path / "net.pt2"], capture_output=True, text=True)
    assert json.loads(done.stdout) == {"logits": [5, 4], "hidden": None}, done.stderr


def test_outputs_of_own_classes_become_plain_in_a_file_and_are_back_in_a_session(tmp_path):
    model = made(Net(lambda y: Scores(y, hidden=None)))
    report = export(model, tmp_path / "net.pt2", rows())
    assert [each.name for each in report.outputs] == ["logits"]
    assert type(torch.export.load(tmp_path / "net.pt2").module()(rows())) is dict
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


@dataclasses.dataclass
class Computing:
    logits: Tensor

    def __post_init__(self):
        self.shares = self.logits.softmax(1)


def test_a_session_hands_out_nothing_of_the_first_call(tmp_path):
    made_by_model = []

    def function(y):
        cache = Cache()
        made_by_model.extend(weakref.ref(each) for each in (cache, y))
        return {"scores": Computing(y), "cache": cache, "kind": 3}

    model = made(Net(function))
    export(model, tmp_path / "net.pt2", rows())
    del made_by_model[:]
    with torch.no_grad(), session_forward(model, tmp_path / "net.pt2"):
        model(rows())
        out = model(rows(6, 8))
        gc.collect()
        assert [each() for each in made_by_model] == [None, None]
    assert out["cache"] is None
    assert out["kind"] == 3
    assert out["scores"].logits.shape == (6, 4)
    assert not hasattr(out["scores"], "shares")


def test_a_file_of_more_outputs_than_the_method_has_is_an_error(tmp_path):
    model = made(Net(lambda y: (y, y + 1)))
    export(model, tmp_path / "net.pt2", rows())
    model.function = lambda y: y
    with (
        session_forward(model, tmp_path / "net.pt2"),
        pytest.raises(TinyQError, match="2 tensors, and what Net returns has 1"),
    ):
        model(rows())


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


def largest(y):
    return heapq.nlargest(2, [*y[0, :3]])[0]


MISTAKES = [
    (lambda: Net(largest), rows(), r"a branch or a size from the values .*, at test_any_forward\.py:\d+"),
    (lambda: Net(nn.functional.dropout), rows(), "other numbers for the same inputs each time .*self.training"),
    (lambda: Net(branching), rows(), r"a branch or a size from the values .*, at test_any_forward\.py:\d+"),
    (lambda: Net(lambda y: {"a.b": y, "a": {"b": y}}), rows(), "two outputs of the model would have the name 'a.b'"),
    (lambda: Net(), rows().to_sparse(), "the example input x of Net.forward is a sparse tensor"),
    (lambda: Net(), rows(0, 8), r"has the shape \[0, 8\], and nothing can be computed of no rows"),
    (Holding, (Scores(rows()),), "the example input x of Holding.forward is a Scores, which graphs do not take"),
    (Holding, (NamedTuple("Row", [("x", Tensor)])(rows()),), "holds a Row, whose class a file of torch.export does"),
]


@pytest.mark.parametrize(("make", "inputs", "message"), MISTAKES, ids=[each[2][:30] for each in MISTAKES])
def test_what_no_graph_can_hold_is_an_error_that_says_what_to_write(tmp_path, make, inputs, message):
    with pytest.raises(TinyQError, match=message):
        export(made(make()), tmp_path / "net.pt2", inputs)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.__version__.startswith("2.7"), reason="torch 2.7 exports scripted modules")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_module_is_named(tmp_path):
    with pytest.raises(TinyQError, match=r"function is a scripted module, .*torch itself says: "):
        export(made(Scripted()), tmp_path / "net.pt2", rows())


class PackingOneLength(Packing):
    """Packs, and works for the batch of its example alone."""

    def forward(self, x, lengths):
        if len(x) != 3:
            raise ValueError("three rows, please")
        return super().forward(x, lengths)


def test_a_model_that_fails_in_other_sizes_has_torchs_own_reason_and_advice(tmp_path):
    with pytest.raises(TinyQError, match="If the sizes of batch may not change, give dynamic=False"):
        export(made(PackingOneLength()), tmp_path / "net.pt2", (rows(3, 4, 6)[:1].expand(3, 4, 6), torch.full((3,), 4)))


@pytest.mark.parametrize(
    "batch", [collections.defaultdict(list, x=rows()), collections.OrderedDict(x=rows()), collections.deque([rows()])]
)
def test_containers_of_the_standard_library_are_inputs(tmp_path, capfd, batch):
    class Taking(Net):
        def forward(self, batch):
            return self.layer(batch["x"] if isinstance(batch, dict) else batch[0])

    assert export(made(Taking()), tmp_path / "net.pt2", {"batch": batch}).relative_error < 1e-3
    assert capfd.readouterr().err == ""


def test_jitter_of_the_last_bit_does_not_hide_a_fault_of_the_file(tmp_path):
    def function(y):
        return y * 2 if torch.compiler.is_compiling() else y + 1e-6 * torch.rand_like(y)

    with pytest.raises(TinyQError, match=r"of what was written is .* from the quantized model"):
        export(made(Net(function)), tmp_path / "net.pt2", rows())


@needs_onnx
def test_complex_numbers_are_refused_where_a_runtime_has_none(tmp_path):
    model = made(Net(torch.fft.rfft))
    with pytest.raises(TinyQError, match=r"an output of the model is complex, .*torch\.view_as_real"):
        export(model, tmp_path / "net.onnx", rows())
    assert export(model, tmp_path / "net.pt2", rows()).relative_error < 1e-3


class OfAnyLength(nn.Module):
    """A recurrent layer."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 4, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


def test_lengths_that_recurrent_layers_of_a_program_cannot_change_are_named(tmp_path):
    with pytest.raises(TinyQError, match="recurrent layers such as lstm for one length of sequence: leave that"):
        export(made(OfAnyLength()), tmp_path / "net.pt2", rows(3, 5, 6), dynamic={0: "batch", 1: "steps"})
    assert not list(tmp_path.iterdir())


class Shifted(nn.LSTM):
    def forward(self, x, hx=None):
        return super().forward(x + 1, hx)


@needs_onnx
def test_an_own_forward_of_a_recurrent_layer_is_not_said_to_take_any_length(tmp_path):
    model = OfAnyLength()
    model.lstm = Shifted(6, 4, batch_first=True)
    with pytest.raises(TinyQError, match=r"pad to one length \(its forward is the user's own"):
        export(made(model), tmp_path / "net.onnx", rows(3, 5, 6), dynamic={0: "batch", 1: "steps"})


class Choosing(Net):
    def forward(self, x):
        return torch.cond(x.mean() > 0, self.layer, lambda x: self.layer(-x), (x,))


@needs_onnx
def test_quantized_layers_in_branches_of_cond_are_told_in_onnx(tmp_path):
    with pytest.raises(TinyQError, match=r"a branch of torch\.cond.*choose by torch\.where"):
        export(made(Choosing()), tmp_path / "net.onnx", rows())
    assert not list(tmp_path.iterdir())


def test_exports_of_several_threads_take_turns(tmp_path):
    models = [made(Net(torch.relu)) for _ in range(4)]

    def one(index):
        return export(models[index], tmp_path / f"{index}.pt2", rows()).relative_error

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(one, range(4))) < 1e-3
    assert torch.backends.mha.get_fastpath_enabled()
