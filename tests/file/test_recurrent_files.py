"""Files of models with recurrent layers: the same bits through every door, in bounded memory."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from models import Net, keeper, loader, samples, trainer
from torch import nn

from tinyq_lightning import QuantizedCheckpointMixin, TinyQCallback, load_quantized, quantize
from tinyq_lightning.errors import CheckpointError
from tinyq_lightning.file.archive import Archive
from tinyq_lightning.file.checkpoint import _digests, read_checkpoint, write_checkpoint
from tinyq_lightning.file.from_float import FloatFile, quantize_file
from tinyq_lightning.file.loading import _built_weightless
from tinyq_lightning.file.safetensors import read_safetensors, write_safetensors
from tinyq_lightning.layers import QuantizedLSTM, QuantizedLSTMCell
from tinyq_lightning.spec.spec import as_spec

SPEC = {"method": "w8a8", "exclude": ["left"]}
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")


class Reader(Net):
    """Layers, a cell, projections, one without biases, and one that stays float."""

    def __init__(self, width=16, lr=0.02):
        super().__init__(width, lr)
        self.rnn = nn.LSTM(2, width, 2, batch_first=True, bidirectional=True, proj_size=8)
        self.up = nn.GRU(width, 8, batch_first=True, bias=False)
        self.cell = nn.LSTMCell(8, 8)
        self.left = nn.RNN(8, 8, batch_first=True)

    def forward(self, x):
        steps = self.left(self.up(self.rnn(x.unflatten(1, (4, 2)))[0])[0])[0]
        return super().forward(self.cell(steps[:, -1])[0])


class Mixed(QuantizedCheckpointMixin, Reader):
    """Loads quantized files by itself."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The callback of a run without a metric, and that of an evaluation."""
    folder = tmp_path_factory.mktemp("run")
    callback = TinyQCallback(SPEC, report=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no validation, which is wanted here
        run = trainer(folder, keeper(folder, monitor=None), callback, max_epochs=1, limit_val_batches=0)
        run.fit(Reader(), loader(shuffle=True))
    assert callback.error is None
    return callback


def test_from_file_to_file_gives_the_bytes_of_the_callback_layer_by_layer(made, tmp_path):
    with Archive(made.float_path) as source:
        assert not FloatFile(source, Reader, {}).loaded
        write_checkpoint(quantize_file(source, Reader, as_spec(SPEC), {})[0], tmp_path / "command.ckpt")
    assert (tmp_path / "command.ckpt").read_bytes() == Path(made.quantized_path).read_bytes()


def test_safetensors_and_back_gives_the_same_bytes(made, tmp_path):
    write_safetensors(read_checkpoint(made.quantized_path), tmp_path / "q.safetensors")
    write_checkpoint(read_safetensors(tmp_path / "q.safetensors"), tmp_path / "back.ckpt")
    assert (tmp_path / "back.ckpt").read_bytes() == Path(made.quantized_path).read_bytes()


def test_every_door_gives_the_quantized_models_own_outputs(made, tmp_path):
    x = samples(32, 3).tensors[0]
    module = Reader.load_from_checkpoint(made.float_path, weights_only=True).eval()
    before = copy.deepcopy(module.state_dict())
    quantize(module, SPEC)
    wanted = module(x)
    loaded = load_quantized(made.quantized_path, Reader)
    assert isinstance(loaded.rnn, QuantizedLSTM)
    assert isinstance(loaded.cell, QuantizedLSTMCell)
    assert type(loaded.left) is nn.RNN
    assert torch.equal(loaded(x), wanted)
    assert torch.equal(Mixed.load_from_checkpoint(made.quantized_path, weights_only=True).eval()(x), wanted)
    assert _built_weightless(Reader, read_checkpoint(made.quantized_path), {}, "the file", False) is not None

    seen, fresh = [], Reader()
    flat = list(fresh.rnn._flat_weights)
    fresh.on_test_batch_end = lambda *args: seen.append(fresh(x))
    trainer(tmp_path, TinyQCallback("w8a8", when="test_start")).test(
        fresh, loader(), ckpt_path=made.quantized_path, verbose=False
    )
    assert torch.equal(seen[0], wanted)
    assert type(fresh.rnn) is nn.LSTM, "the float layer is back, with the dequantized weights"
    assert all(one is other for one, other in zip(fresh.rnn._flat_weights, flat, strict=True))
    assert torch.equal(fresh.rnn.weight_hh_l1, loaded.rnn.weight_hh_l1)
    assert torch.equal(fresh.rnn.bias_hh_l1, before["rnn.bias_hh_l1"])
    assert torch.allclose(fresh.eval()(x), wanted, atol=0.02), "whose activations are not rounded"


def test_a_float_layer_of_a_loaded_file_can_be_trained_copied_and_moved(made):
    layer = load_quantized(made.quantized_path, Reader).left
    with torch.no_grad():
        layer.weight_ih_l0.mul_(2)
    x = torch.randn(2, 3, 8)
    assert torch.equal(layer(x)[0], copy.deepcopy(layer)(x)[0])
    assert torch.equal(layer.double()(x.double())[0], copy.deepcopy(layer)(x.double())[0])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state.pop("rnn.weight_hh_l1.scales"), "rnn.weight_hh_l1.scales is not one float32 for each row"),
        (lambda state: state.update({"up.weight_ih_l0.scales": torch.zeros(24)}), "holds what is no positive number"),
        (lambda state: state.pop("cell.weight_hh.int8_weights"), "Missing key.*cell.weight_hh.int8_weights"),
        (
            lambda state: state.update({"up.weight_ih_l0.int8_weights": torch.zeros(24, 8, dtype=torch.int8)}),
            r"layer 'up' is \[24, 8\] in .* and \[24, 16\] in Reader",
        ),
    ],
)
def test_a_damaged_file_is_refused_by_name(made, tmp_path, change, told):
    content = read_checkpoint(made.quantized_path)
    change(content["state_dict"])
    content["tinyq"]["digests"] = _digests(content)
    write_checkpoint(content, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match=told):
        load_quantized(tmp_path / "bad.ckpt", Reader)


@pytest.mark.parametrize(("name", "tied_to"), [("up", "body.0"), ("head", "rnn"), ("cell", "up"), ("head", "body.0")])
def test_a_tie_between_weights_of_other_shapes_is_refused_by_name(made, tmp_path, name, tied_to):
    content = read_checkpoint(made.quantized_path)
    entries = {entry["name"]: entry for entry in content["tinyq"]["plan"]}
    entries[name]["tied_to"] = tied_to
    content["tinyq"]["plan"].sort(key=lambda entry: entry["name"] == name)  # a tie is to a layer before it
    content["tinyq"]["digests"] = _digests(content)
    write_checkpoint(content, tmp_path / "bad.ckpt")
    for load in (lambda path: load_quantized(path, Reader, strict=False), Mixed.load_from_checkpoint):
        with pytest.raises(CheckpointError, match=f"bad.ckpt: .*layer '{name}' cannot share the codes of '{tied_to}'"):
            load(tmp_path / "bad.ckpt")
