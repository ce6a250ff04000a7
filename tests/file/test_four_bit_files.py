"""Files of four bits: the same bytes by every door, bit-equal when they are loaded, small, and refused if damaged."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from models import Net, keeper, loader, trainer
from torch import nn

from tinyq_lightning import TinyQCallback, load_quantized, quantize, quantized
from tinyq_lightning.errors import CheckpointError
from tinyq_lightning.file.archive import Archive
from tinyq_lightning.file.checkpoint import file_sha256, make_checkpoint, read_checkpoint, write_checkpoint
from tinyq_lightning.file.from_float import FloatFile, quantize_file
from tinyq_lightning.file.safetensors import read_safetensors, write_safetensors
from tinyq_lightning.layers import Int8Weight
from tinyq_lightning.spec.spec import as_spec

SPEC = {"method": "w4a32", "exclude": ["body.2"], "rules": [{"match": "attention", "method": "w8a8"}]}
SPEC["rules"] += [{"match": "experts", "method": "w4a32"}]


class EveryKind(Net):
    """A layer of each kind, ties, and a matrix that no layer has."""

    def __init__(self, width=16, lr=0.02):
        super().__init__(width, lr)
        self.embed, self.lm_head = nn.Embedding(7, width), nn.Linear(width, 7, bias=False)
        self.lm_head.weight = self.embed.weight
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.conv, self.up = nn.Conv1d(1, 8, 5, padding=2), nn.ConvTranspose1d(8, 4, 4)
        self.lstm = nn.LSTM(width, width, bidirectional=True, batch_first=True)
        self.experts = nn.Parameter(torch.randn(2, width, width) * 0.1)

    def forward(self, x):
        h = self.body(x)
        h = h + self.attention(h[:, None], h[:, None], h[:, None])[0][:, 0]
        h = h + self.lstm(h[:, None])[0][:, 0, : h.shape[1]] + torch.einsum("bi,eoi->bo", h, self.experts)
        h = h + self.up(self.conv(x[:, None])).mean((1, 2))[:, None] + self.embed(torch.arange(7)).mean()
        return self.head(h) + self.lm_head(h).mean(1, keepdim=True)


class Renamed(EveryKind):
    """Its state dict has other names than its modules."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {f"net.{name}": value for name, value in checkpoint["state_dict"].items()}

    def on_load_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name.removeprefix("net."): value for name, value in state.items()}


def points():
    return next(iter(loader(seed=3)))[0]


@pytest.fixture(scope="module", params=[EveryKind, Renamed], ids=lambda kind: kind.__name__)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    callback = TinyQCallback(SPEC, report=False)
    fit = trainer(folder, keeper(folder), callback, max_epochs=1)
    fit.fit(request.param(), loader(shuffle=True), loader(seed=1))
    assert callback.error is None
    return callback, request.param


def test_the_file_has_packed_codes_and_says_so(run):
    callback, _ = run
    content = read_checkpoint(callback.quantized_path)
    assert content["tinyq"]["format_version"] == 2
    assert Path(callback.quantized_path).name.startswith("mixed-")
    state = {name.removeprefix("net."): value for name, value in content["state_dict"].items()}
    for name, rows, columns in (
        ("head", 4, 16),
        ("conv", 8, 5),
        ("up", 4, 32),
        ("lm_head", 7, 16),
        ("lstm.weight_ih_l0", 64, 16),
        ("experts", 32, 16),
    ):
        assert state[f"{name}.int4_weights"].shape == (rows, (columns + 1) // 2)
        assert state[f"{name}.multipliers"].shape == (rows, 1)
        assert {state[f"{name}.{entry}"].dtype for entry in ("int4_weights", "multipliers")} == {torch.uint8}
        assert f"{name}.int8_weights" not in state
    assert state["attention.in_proj.int8_weights"].dtype == torch.int8
    places = {state[f"{name}.int4_weights"].untyped_storage()._cdata for name in ("embed", "lm_head")}
    assert len(places) == 1


def test_every_door_gives_the_same_bytes(run, tmp_path):
    callback, kind = run
    with Archive(callback.float_path) as source:
        assert FloatFile(source, kind, {}).loaded == (kind is Renamed)
        made = quantize_file(source, kind, as_spec(SPEC), {})[0]
    module = kind.load_from_checkpoint(callback.float_path, weights_only=True)
    plan, base = quantize(module, SPEC), torch.load(callback.float_path, weights_only=True)
    again = make_checkpoint(base, module.state_dict(), plan, {}, file_sha256(callback.float_path), None)
    for content, name in ((made, "command"), (again, "quantize")):
        write_checkpoint(content, tmp_path / f"{name}.ckpt")
    assert (tmp_path / "command.ckpt").read_bytes() == (tmp_path / "quantize.ckpt").read_bytes()
    written = read_checkpoint(callback.quantized_path)["tinyq"]["digests"]
    assert written["state_dict"] == made["tinyq"]["digests"]["state_dict"]


def test_a_loaded_module_is_bit_equal_to_what_was_measured(run):
    callback, kind = run
    floats = kind.load_from_checkpoint(callback.float_path, weights_only=True).eval()
    with quantized(floats, callback.plan.to_spec()), torch.no_grad():
        wanted, state = floats(points()), copy.deepcopy(floats.state_dict())
    loaded = load_quantized(callback.quantized_path, kind)
    with torch.no_grad():
        assert torch.equal(loaded(points()), wanted)
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert loaded.lm_head.int8_weights is loaded.embed.int8_weights
    assert {layer.bits for layer in loaded.modules() if isinstance(layer, Int8Weight)} == {4, 8}


def test_safetensors_and_back_loses_nothing(run, tmp_path):
    callback, _ = run
    content = read_checkpoint(callback.quantized_path)
    write_safetensors(content, tmp_path / "q.safetensors")
    write_checkpoint(read_safetensors(tmp_path / "q.safetensors"), tmp_path / "again.ckpt")
    assert (tmp_path / "again.ckpt").read_bytes() == Path(callback.quantized_path).read_bytes()


@pytest.mark.parametrize(
    ("entry", "change", "message"),
    [
        ("multipliers", torch.zeros_like, "multipliers holds a zero"),
        ("multipliers", lambda value: value[:, :0], "multipliers has the shape"),
        ("multipliers", lambda value: value.int(), "multipliers holds no codes of torch.uint8"),
        ("multipliers", None, "multipliers holds no codes of torch.uint8"),
        ("int4_weights", lambda value: value.view(torch.int8), "int4_weights holds no codes of torch.uint8"),
        ("int4_weights", lambda value: value[:1], "scales is not one float32 for each row"),
        ("int4_weights", None, "no codes of the layer 'head'"),
        ("scales", torch.zeros_like, "scales holds what is no positive number"),
    ],
)
def test_damaged_codes_are_refused_with_the_layer_named(run, tmp_path, entry, change, message):
    callback, _ = run
    content = torch.load(callback.quantized_path, weights_only=True)
    state = content["state_dict"]
    name = next(name for name in state if name.endswith(f"head.{entry}") and "lm_" not in name)
    if change is None:
        del state[name]
    else:
        state[name] = change(state[name])
    plan = type(callback.plan)(callback.plan.decisions, callback.plan.spec)
    with pytest.raises(CheckpointError, match=rf"head.*{message}|{message}"):
        make_checkpoint(torch.load(callback.float_path, weights_only=True), state, plan, {}, None, None)


def test_codes_of_another_size_are_refused(run):
    callback, kind = run
    with pytest.raises(CheckpointError, match=r"layer '.*' is (packed )?\[.*\] in .* and \[.*\] in"):
        load_quantized(callback.quantized_path, kind, width=12)


def test_only_files_with_four_bits_have_the_new_version(tmp_path):
    for method, version in (("w8a32", 1), ("w4a32", 2)):
        module = Net()
        plan = quantize(module, method)
        content = make_checkpoint({}, module.state_dict(), plan, {}, None, None)
        assert content["tinyq"]["format_version"] == version


def test_linear_weights_take_a_seventh_of_their_bytes_and_less():
    wide = nn.Sequential(nn.Linear(1024, 512, bias=False))
    before = sum(value.nbytes for value in wide.state_dict().values())
    quantize(wide, "w4a32")
    assert sum(value.nbytes for value in wide.state_dict().values()) <= 0.135 * before
