"""What is promised of the way from file to file: the callback's bytes, and a refusal where it cannot give them."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from models import FEATURES, Net, keeper, loader, trainer
from torch import nn

from tinyq_lightning import QuantizationSpec, TinyQCallback, load_quantized, quantize
from tinyq_lightning.command import main
from tinyq_lightning.errors import CheckpointError, ModelError, SpecError
from tinyq_lightning.file.archive import Archive
from tinyq_lightning.file.checkpoint import file_sha256, make_checkpoint, write_checkpoint
from tinyq_lightning.file.from_float import FloatFile, float_content, quantize_file
from tinyq_lightning.spec.spec import as_spec

SPEC = {"method": "w8a32", "exclude": ["head"], "rules": [{"match": "body.2", "method": "w8a8"}]}


class WithEverything(Net):
    """Embeddings, attention, norms with statistics, ties, a Linear under two names."""

    def __init__(self, width=16, lr=0.02):
        super().__init__(width, lr)
        self.norm = nn.BatchNorm1d(FEATURES)
        self.embed, self.lm_head = nn.Embedding(7, width), nn.Linear(width, 7, bias=False)
        self.lm_head.weight = self.embed.weight
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.again = self.body[0]

    def forward(self, x):
        x = self.body(self.norm(x))
        return self.head(x + self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0])


class Bounded(Net):
    """A weight computed from a parameter and buffers that stand in the file."""

    def __init__(self, width=16, lr=0.02):
        super().__init__(width, lr)
        self.body[2] = nn.utils.parametrizations.spectral_norm(self.body[2])


class RenamesOnLoading(Net):
    """Its hook makes another state dict of the file's."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {f"net.{name}": value for name, value in checkpoint["state_dict"].items()}

    def on_load_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name.removeprefix("net."): value for name, value in state.items()}


class ReadsItsWeights(Net):
    def __init__(self, width=16, lr=0.02):
        super().__init__(width, lr)
        self.bound = self.head.weight.abs().max().item()


class LoadsInItsOwnWay(Net):
    def __init__(self, width=16, lr=0.02):
        super().__init__(width, lr)
        self.register_load_state_dict_pre_hook(self._double)

    @staticmethod
    def _double(module, state_dict, *rest):
        state_dict["head.weight"] = state_dict["head.weight"] * 2


def after_training(folder, kind, **settings) -> TinyQCallback:
    """The callback of a real run, which wrote a file without a metric in it."""
    callback = TinyQCallback(SPEC, report=False)
    run = trainer(folder, keeper(folder, monitor=None), callback, max_epochs=1, limit_val_batches=0, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no validation, which is wanted here
        run.fit(kind(), loader(shuffle=True))
    return callback


KINDS = [(Net, False), (WithEverything, False), (Bounded, False), (RenamesOnLoading, True), (ReadsItsWeights, True)]
KINDS += [(LoadsInItsOwnWay, True)]


@pytest.mark.parametrize(("kind", "whole"), KINDS, ids=[kind.__name__ for kind, _ in KINDS])
def test_every_door_gives_the_same_bytes(tmp_path, kind, whole):
    callback = after_training(tmp_path, kind)
    path = callback.float_path
    with Archive(path) as source:
        assert FloatFile(source, kind, {}).loaded == whole
        write_checkpoint(quantize_file(source, kind, as_spec(SPEC), {})[0], tmp_path / "command.ckpt")

    module = kind.load_from_checkpoint(path, weights_only=True)
    plan, base = quantize(module, SPEC), torch.load(path, weights_only=True)
    content = make_checkpoint(base, module.state_dict(), plan, {}, file_sha256(path), None)
    write_checkpoint(content, tmp_path / "quantize.ckpt")

    by_callback = Path(callback.quantized_path).read_bytes()
    assert (tmp_path / "command.ckpt").read_bytes() == by_callback
    assert (tmp_path / "quantize.ckpt").read_bytes() == by_callback


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_the_float_files_dtypes_are_kept(tmp_path, precision):
    callback = after_training(tmp_path, Net, precision=precision)
    with Archive(callback.float_path) as source:
        write_checkpoint(quantize_file(source, Net, as_spec(SPEC), {})[0], tmp_path / "command.ckpt")
    assert (tmp_path / "command.ckpt").read_bytes() == Path(callback.quantized_path).read_bytes()


def test_what_cannot_be_quantized_is_refused_as_ever(tmp_path):
    module = Net()
    content = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    torch.save(content, tmp_path / "good.ckpt")
    with torch.no_grad():
        module.body[0].weight[0, 0] = torch.nan
    torch.save({**content, "state_dict": module.state_dict()}, tmp_path / "nan.ckpt")
    torch.save({**content, "hyper_parameters": {"width": 8}}, tmp_path / "narrow.ckpt")
    torch.save({**content, "tinyq": {}}, tmp_path / "quantized.ckpt")
    torch.save({"model": content}, tmp_path / "odd.ckpt")
    for name, spec, error, message in (
        ("nan", "w8a32", ModelError, r"body\.0: 1 of 128"),
        ("good", {"exclude": ["haed"]}, SpecError, "Did you mean 'head'"),
        ("narrow", "w8a32", CheckpointError, r"narrow\.ckpt: it does not fit Net"),
        ("quantized", "w8a32", CheckpointError, r"quantized\.ckpt: it is quantized already"),
        ("odd", "w8a32", CheckpointError, r"odd\.ckpt: it has no state_dict"),
    ):
        with pytest.raises(error, match=message), Archive(tmp_path / f"{name}.ckpt") as source:
            quantize_file(source, Net, as_spec(spec), {})
    with Archive(tmp_path / "nan.ckpt") as source:
        made = quantize_file(source, Net, QuantizationSpec(non_finite="float"), {})[0]
    assert [entry["reason"] for entry in made["tinyq"]["plan"]] == ["non-finite weights", "spec", "spec"]


def test_state_dicts_of_training_scripts_are_taken_and_what_is_unclear_is_named(tmp_path):
    module = Net()
    state, others = module.state_dict(), {"optimizer": {"state": {0: torch.ones(2)}, "param_groups": []}, "epoch": 3}
    parallel = {f"module.{name}": value for name, value in state.items()}
    wanted = _written(tmp_path / "bare.ckpt", state)
    for name, content in {"model": {"model": state, **others}, "ddp": parallel, "both": {"net": parallel}}.items():
        made = _written(tmp_path / f"{name}.ckpt", content)
        assert made.keys() == wanted.keys()
        assert all(torch.equal(made[entry], wanted[entry]) for entry in wanted), name
    wide = {**state, "body.0.weight": torch.ones(5, 8), "more": torch.ones(1)}
    for name, content, trust, message in (
        (
            "two",
            {"model": state, "ema": state},
            (),
            r"two\.ckpt: it has several state dicts, 'model', 'ema': write a file of",
        ),
        ("whole", module, True, r"whole\.ckpt: it holds a whole Net, not its weights: torch\.save\(module\.state_dict"),
        (
            "wide",
            wide,
            (),
            r"it does not fit Net: 'body\.0\.weight' is \[5, 8\] in the file and \[16, 8\] in Net \(and 1 m",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            _written(tmp_path / f"{name}.ckpt", content, trust)


def _written(path, content, trust=()):
    torch.save(content, path)
    if trust:
        return float_content(torch.load(path, weights_only=False), str(path))
    with Archive(path) as source:
        return quantize_file(source, Net, as_spec("w8a32"), {})[0]["state_dict"]


@pytest.mark.parametrize("error", [KeyError("a"), ValueError("a"), AssertionError("a"), ModelError("mine")], ids=repr)
@pytest.mark.parametrize("where", ["__init__", "on_load_checkpoint"])
def test_what_the_class_raises_is_told_with_the_file(tmp_path, where, error):
    def fail(self, *arguments, **more):
        raise error

    torch.save({"state_dict": Net().state_dict()}, tmp_path / "float.ckpt")
    wanted = type(error) if isinstance(error, ModelError) else CheckpointError
    message = "mine" if isinstance(error, ModelError) else r"float\.ckpt: it does not fit Fails: .*a"
    with pytest.raises(wanted, match=message), Archive(tmp_path / "float.ckpt") as source:
        FloatFile(source, type("Fails", (Net,), {where: fail}), {})


def test_a_truncated_float_file_is_refused(tmp_path):
    torch.save({"state_dict": Net().state_dict()}, tmp_path / "float.ckpt")
    data = (tmp_path / "float.ckpt").read_bytes()
    (tmp_path / "float.ckpt").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"float\.ckpt: the file is truncated"):
        Archive(tmp_path / "float.ckpt")


@pytest.mark.slow
def test_the_memory_figures_hold(tmp_path):
    """4096×4096 weights take 65 MB each: too many for a quick test, too few would drown in the noise."""
    script = Path(__file__).parents[2] / "examples" / "bench"
    subprocess.run([sys.executable, script, "--parts", "memory", "--json", tmp_path / "figures.json"], check=True)
    cells = json.loads((tmp_path / "figures.json").read_text())["cells"]
    figures = {cell["contender"]: cell["share"] for cell in cells}
    assert figures["file"] <= 0.45
    assert figures["load"] <= 0.36
    assert figures["file_w4"] <= 0.3


class Plain(nn.Module):
    """No LightningModule."""

    def __init__(self, width=16):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(8, width), nn.ReLU()), nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.body(x))


def plain_net():
    """A function that makes a module."""
    return Plain(12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch.compile imports it
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("factory", ["Plain", "plain_net"])
def test_a_state_dict_of_plain_pytorch_is_quantized_by_the_command(tmp_path, capsys, factory, compiled):
    net = globals()[factory]()
    saved = torch.compile(net) if compiled else net
    torch.save(saved.state_dict(), tmp_path / "net.pt")
    command = ["quantize", str(tmp_path / "net.pt"), "--model", f"{__name__}:{factory}"]
    assert main([*command, "--output", str(tmp_path / "q.ckpt")]) == 0
    assert "2 layers" in capsys.readouterr().out
    again = load_quantized(tmp_path / "q.ckpt", globals()[factory])
    quantize(net.eval(), "w8a32")
    assert torch.equal(again(torch.ones(3, 8)), net(torch.ones(3, 8)))
    assert main(["inspect", str(tmp_path / "net.pt")]) == 0
    assert "float state dict" in capsys.readouterr().out
    assert (
        main(["evaluate", str(tmp_path / "q.ckpt"), "--model", f"{__name__}:{factory}", "--data", "models:Blobs"]) == 1
    )
    assert "no LightningModule, and has no test loop" in capsys.readouterr().err
