"""Files of convolutional networks: bit-equal by every door, from file to file, and small."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conv_nets import UNet, conv_bn
from models import Net, keeper, loader, trainer
from torch import nn

from tinyq_lightning import TinyQCallback, load_quantized, quantized
from tinyq_lightning.errors import CheckpointError
from tinyq_lightning.file.archive import Archive
from tinyq_lightning.file.checkpoint import read_checkpoint, write_checkpoint
from tinyq_lightning.file.from_float import FloatFile, quantize_file
from tinyq_lightning.file.safetensors import read_safetensors, write_safetensors
from tinyq_lightning.layers.conv import QuantizedConv
from tinyq_lightning.search import timing


class ConvNet(Net):
    """Convolutions of each kind on the features, taken for images of two columns."""

    def __init__(self, width=16, lr=0.02):
        super().__init__(width, lr)
        self.net = nn.Sequential(conv_bn(1, 24), nn.Conv2d(24, 24, 3, padding=1, groups=4), UNet(8, 24))
        self.causal = nn.Conv1d(4, 4, 3, padding=2)
        self.causal_again = self.causal

    def forward(self, x):
        images = nn.functional.pad(x, (0, 64 - x.shape[1])).view(-1, 1, 8, 8)
        x = x + self.net(images).flatten(1)[:, : x.shape[1]] * 0.1
        return super().forward(x) + self.causal(x[:, None, :8].expand(-1, 4, -1)).mean((1, 2))[:, None]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    callback = TinyQCallback({"method": "w8a8", "kernel": "int8"}, report=False)
    fit = trainer(folder, keeper(folder), callback)
    module = ConvNet()
    fit.fit(module, loader(shuffle=True), loader(seed=1))
    assert callback.error is None
    return callback, module, fit


def points():
    return next(iter(loader(seed=3)))[0]


def test_every_door_gives_the_bits_that_were_measured(run):
    callback, module, fit = run
    floats = ConvNet.load_from_checkpoint(callback.float_path, weights_only=True).eval()
    with quantized(floats, callback.plan.to_spec()), torch.no_grad():
        state, wanted = copy.deepcopy(floats.state_dict()), floats(points())
    loaded = load_quantized(callback.quantized_path, ConvNet).eval()
    assert sum(isinstance(layer, QuantizedConv) for layer in loaded.modules()) == 12
    assert loaded.causal is loaded.causal_again
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded(points()), wanted)
    scores = fit.test(module, loader(seed=1), ckpt_path=callback.quantized_path, verbose=False)
    assert scores == fit.test(loaded, loader(seed=1), verbose=False)
    assert type(module.causal) is nn.Conv1d


def test_from_file_to_file_gives_the_same_codes_layer_by_layer(run):
    callback, _, _ = run
    with Archive(callback.float_path) as source:
        assert not FloatFile(source, ConvNet, {}).loaded
        made = quantize_file(source, ConvNet, callback.plan.to_spec(), {})[0]["state_dict"]
        theirs = torch.load(callback.quantized_path, weights_only=True)["state_dict"]
        assert made.keys() == theirs.keys()
        assert all(torch.equal(torch.as_tensor(value), theirs[name]) for name, value in made.items())


def test_safetensors_and_back_gives_the_same_bytes(run, tmp_path):
    callback, _, _ = run
    write_safetensors(read_checkpoint(callback.quantized_path), tmp_path / "q.safetensors")
    write_checkpoint(read_safetensors(tmp_path / "q.safetensors"), tmp_path / "back.ckpt")
    assert (tmp_path / "back.ckpt").read_bytes() == Path(callback.quantized_path).read_bytes()


def test_a_network_of_another_kernel_size_is_refused_with_both_shapes(run):
    callback, _, _ = run

    class Other(ConvNet):
        def __init__(self, width=16, lr=0.02):
            super().__init__(width, lr)
            self.causal = self.causal_again = nn.Conv1d(4, 4, 5, padding=4)

    with pytest.raises(CheckpointError, match=r"causal.*\[4, 4, 3\].*\[4, 4, 5\]"):
        load_quantized(callback.quantized_path, Other)


def test_budget_report_and_timings_go_over_convolutions(tmp_path, monkeypatch):
    real = timing.time_call

    def time_call(layers, call):
        real(layers, call)
        slower = isinstance(layers[0][0], nn.Conv2d) and layers[0][0].groups > 1
        return timing.Timing(1.0, 2.0 if slower else 1.0)

    monkeypatch.setattr(timing, "time_call", time_call)
    callback = TinyQCallback("w8a8", monitor="val_acc", mode="max", max_drop=0.5, report="full", never_slower=True)
    fit = trainer(tmp_path, keeper(tmp_path), callback)
    fit.fit(ConvNet(), loader(shuffle=True), loader(seed=1))
    assert callback.error is None
    by_name = {decision.name: decision for decision in callback.plan}
    assert by_name["net.2.up_first"].kind == "conv"
    assert by_name["net.2.up_first"].method in ("w8a32", "float")
    assert "left float: quantized, it took" in by_name["net.1"].reason
    assert any(decision.method == "w8a8" for decision in callback.plan)
    assert Path(callback.quantized_path).exists()
