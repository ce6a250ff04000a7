"""What is promised of the file: it loads bit-equal by every door, and a plain class fails loudly."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import pytest
import torch
from lightnings import LightningModule
from models import FEATURES, Net, keeper, loader, trainer
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from tinyq_lightning import QuantizedCheckpointMixin, TinyQCallback, load_quantized, quantize, quantized
from tinyq_lightning.errors import CheckpointError, ModelError, TrainerError


class MixedIn(QuantizedCheckpointMixin, Net):
    pass


class MixedInWithAHook(QuantizedCheckpointMixin, Net):
    def on_load_checkpoint(self, checkpoint):
        self.epoch_of_file = checkpoint["epoch"]


def in_memory(callback):
    """The float checkpoint quantized again, here: what every reload must equal."""
    module = Net.load_from_checkpoint(callback.float_path, weights_only=True).eval()
    with quantized(module, callback.plan.to_spec()):
        return {name: value.clone() for name, value in module.state_dict().items()}, module(points())


def points():
    return torch.randn(7, FEATURES, generator=torch.Generator().manual_seed(0))


def assert_bit_equal(module, wanted):
    state, output = wanted
    assert module.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert torch.equal(module.eval()(points()), output)


class CompiledBody(Net):
    def __init__(self, width=16):
        super().__init__(width)
        self.body = torch.compile(self.body, backend="eager")


class CheckpointedBody(Net):
    """As activation checkpointing is switched on for a model that another class made."""

    def __init__(self, width=16):
        super().__init__(width)
        apply_activation_checkpointing(self.body, check_fn=lambda each: isinstance(each, nn.Linear))


class Lazy(Net):
    """As lazy layers are used with Lightning: made by a batch in setup, which a loader does not call."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Unflatten(1, (2, 4)), nn.LazyConv1d(4, 3, groups=2), nn.Flatten(), nn.LazyLinear(16)
        )
        self.up = nn.LazyConvTranspose1d(4, 2)

    def setup(self, stage):
        self(points())

    def forward(self, x):
        return self.head(self.body(x)) + self.up(x.view(-1, 8, 1)).mean(2)


@pytest.mark.parametrize("kind", [CompiledBody, CheckpointedBody, Lazy])
@pytest.mark.parametrize("method", ["w8a32", "w4a32"])
def test_compiled_and_lazy_layers_are_saved_and_load_again(tmp_path, kind, method):
    callback, model = TinyQCallback(method, report=False, strict=True), kind()
    trainer(tmp_path, keeper(tmp_path), callback, max_epochs=1).fit(model, loader(), loader(seed=1))
    assert {decision.method for decision in callback.plan} <= {"w8a32", method}
    again = load_quantized(callback.quantized_path, kind)
    model.load_state_dict(torch.load(callback.float_path, weights_only=True)["state_dict"])
    with quantized(model.eval(), callback.plan.to_spec()), torch.no_grad():
        assert torch.equal(again(points()), model(points()))


@pytest.mark.parametrize("method", ["w8a32", "w4a32"])
@pytest.mark.parametrize(("saved", "loaded"), [(Net, CompiledBody), (CompiledBody, Net), (CheckpointedBody, Net)])
def test_a_file_loads_into_the_class_with_other_wrappers(tmp_path, saved, loaded, method):
    callback, model = TinyQCallback(method, report=False, strict=True), saved()
    trainer(tmp_path, callback, max_epochs=1).fit(model, loader(), loader(seed=1))
    quantize(model, method)
    again = load_quantized(callback.quantized_path, loaded)
    for value, expected in zip(again.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(value, expected)
    with torch.no_grad():  # a compiled product may round otherwise
        torch.testing.assert_close(again(points()), model.eval()(points()))


class KeepsAWeight(Net):
    """Uses the weight of its head through a list, where no state dict reaches it."""

    def __init__(self):
        super().__init__()
        self.kept = [self.head.weight]

    def forward(self, x):
        return self.body(x) @ self.kept[0].T + self.head.bias


def test_a_float_weight_that_the_module_keeps_beside_its_layer_is_not_a_random_one(tmp_path):
    callback, model = TinyQCallback("w8a32", report=False), KeepsAWeight()
    trainer(tmp_path, keeper(tmp_path), callback, max_epochs=1).fit(model, loader(), loader(seed=1))
    again = load_quantized(callback.quantized_path, KeepsAWeight)
    assert torch.equal(again.kept[0], again.head.weight)
    assert (again(points()) - model.eval()(points())).abs().max() < 0.1


def test_the_file_is_a_lightning_checkpoint_of_plain_data(fitted):
    callback, _, _ = fitted
    content = torch.load(callback.quantized_path, weights_only=True)
    floats = torch.load(callback.float_path, weights_only=True)
    for key in ("epoch", "global_step", "pytorch-lightning_version", "hyper_parameters"):
        assert content[key] == floats[key]
    assert not {"optimizer_states", "callbacks", "loops"} & set(content)
    tinyq = content["tinyq"]
    assert tinyq["format_version"] == 1
    assert tinyq["float_sha256"] == hashlib.sha256(Path(callback.float_path).read_bytes()).hexdigest()
    assert tinyq["metrics"] == callback.results
    assert [entry["name"] for entry in tinyq["plan"]] == ["body.0", "body.2", "head"]
    state = content["state_dict"]
    assert (state["head.int8_weights"].dtype, state["head.scales"].dtype) == (torch.int8, torch.float32)
    assert int(state["head.int8_weights"].min()) >= -127


def test_load_quantized_is_bit_equal_and_in_eval_mode(fitted):
    callback, _, _ = fitted
    module = load_quantized(callback.quantized_path, Net)
    assert type(module) is Net
    assert not module.training
    assert_bit_equal(module, in_memory(callback))


@pytest.mark.parametrize("kind", [MixedIn, MixedInWithAHook])
def test_the_mixin_loads_quantized_and_float_files_by_every_door(fitted, tmp_path, kind):
    callback, _, _ = fitted
    wanted = in_memory(callback)
    module = kind.load_from_checkpoint(callback.quantized_path, weights_only=True)
    assert_bit_equal(module, wanted)
    assert getattr(module, "epoch_of_file", 1) == 1
    by_trainer = kind()
    trainer(tmp_path).test(by_trainer, loader(), ckpt_path=callback.quantized_path, verbose=False, weights_only=True)
    assert_bit_equal(by_trainer, wanted)
    assert isinstance(kind.load_from_checkpoint(callback.float_path, weights_only=True).head, nn.Linear)


@pytest.mark.parametrize("when", ["fit_end", "test_start"])
def test_a_trainer_with_the_callback_takes_the_file_with_an_unmodified_class(fitted, tmp_path, when):
    callback, _, _ = fitted
    reload, module = TinyQCallback("w8a32", when=when, report=False), Net()
    before = [id(each) for each in module.modules()]
    run, path = trainer(tmp_path, reload), callback.quantized_path
    tested = run.test(module, loader(seed=2), ckpt_path=path, verbose=False, weights_only=True)[0]
    directly = load_quantized(path, Net)
    assert tested == trainer(tmp_path).test(directly, loader(seed=2), verbose=False)[0]
    assert reload.results == {name: {"w8a32": value} for name, value in tested.items()}
    validated = run.validate(module, loader(seed=1), ckpt_path=path, verbose=False, weights_only=True)[0]
    assert validated == {name: values["w8a32"] for name, values in callback.results.items()}
    assert [id(each) for each in module.modules()] == before
    assert torch.equal(module.head.weight, directly.head.weight), "float layers hold the dequantized weights"
    run.fit(module, loader(), loader(seed=1))


def test_predict_takes_the_file_too(fitted, tmp_path):
    class Predicts(Net):
        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    callback, _, _ = fitted
    run = trainer(tmp_path, TinyQCallback("w8a32", report=False))
    predicted = run.predict(Predicts(), loader(seed=1), ckpt_path=callback.quantized_path, weights_only=True)
    module = load_quantized(callback.quantized_path, Predicts)
    assert torch.equal(torch.cat(predicted), torch.cat([module(batch[0]) for batch in loader(seed=1)]))


def test_a_plain_class_fails_loudly(fitted, tmp_path):
    callback, _, _ = fitted
    with pytest.raises(RuntimeError, match=r"int8_weights"):
        Net.load_from_checkpoint(callback.quantized_path, weights_only=True)
    with pytest.raises(RuntimeError, match=r"int8_weights"):
        trainer(tmp_path).test(Net(), loader(), ckpt_path=callback.quantized_path, verbose=False, weights_only=True)


def test_the_mixin_refuses_to_resume_and_to_stand_last(fitted, tmp_path):
    with pytest.raises(TrainerError, match="resume the training from the float checkpoint"):
        trainer(tmp_path).fit(MixedIn(), loader(), loader(), ckpt_path=fitted[0].quantized_path, weights_only=True)
    with pytest.raises(ModelError, match="QuantizedCheckpointMixin first"):
        type("Last", (Net, QuantizedCheckpointMixin), {})


def test_resuming_a_training_from_the_file_is_refused(fitted, tmp_path):
    callback, _, _ = fitted
    run = trainer(tmp_path, TinyQCallback("w8a32", report=False))
    with pytest.raises(TrainerError, match="resume the training from the float checkpoint"):
        run.fit(Net(), loader(), loader(), ckpt_path=callback.quantized_path, weights_only=True)


def test_files_that_do_not_fit_are_refused_by_name(fitted, tmp_path):
    callback, _, _ = fitted

    class Other(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

    for path, kind, arguments, message in (
        (callback.quantized_path, Net, {"width": 32}, r"'body\.0' is \[16, 8\].*and \[32, 8\] in Net"),
        (callback.quantized_path, Other, {}, r"'body\.0', Other has no layer of that name\. It has: layer"),
        (callback.quantized_path, Net, {"widht": 3}, "no argument widht"),
        (callback.float_path, Net, {}, "a float Lightning checkpoint"),
        (str(tmp_path / "nothing.ckpt"), Net, {}, "no such file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_quantized(path, kind, **arguments)
    with pytest.raises(ModelError, match="the path comes first, as in load_quantized"):
        load_quantized(Net, callback.quantized_path)


@pytest.mark.parametrize("kind", [OmegaConf.create, lambda values: argparse.Namespace(**values)], ids=["conf", "args"])
def test_hyper_parameters_in_one_object_come_back(tmp_path, kind):
    class Whole(Net):
        def __init__(self, config):
            super().__init__(config.width)
            self.save_hyperparameters()
            self.hparams.lr = config.lr

    callback = TinyQCallback("w8a32", report=False, weights="current")
    config = kind({"width": 12, "lr": 0.1})
    trainer(tmp_path, callback, max_epochs=1).fit(Whole(config), loader(), loader(seed=1))
    module = load_quantized(callback.quantized_path, Whole)
    assert module.head.in_features == 12
    assert type(module.hparams.config) is type(config)


@pytest.mark.filterwarnings("ignore:Attribute 'activation' is an instance")
def test_entries_of_the_users_hooks_come_over_and_what_cannot_is_named(tmp_path):
    class Keeps(Net):
        def __init__(self, width=16, lr=0.02, activation=None):
            super().__init__(width, lr)
            self.save_hyperparameters()

        def on_save_checkpoint(self, checkpoint):
            checkpoint["vocabulary"] = {"a": 1, "b": [2, 3]}

        def on_load_checkpoint(self, checkpoint):
            self.vocabulary = checkpoint["vocabulary"]

    callback = TinyQCallback("w8a32", report=False)
    run = trainer(tmp_path, keeper(tmp_path), callback)
    with pytest.warns(UserWarning, match=r"will not have these hyper-parameters: Keeps\.activation"):
        run.fit(Keeps(activation=nn.GELU()), loader(), loader(seed=1))
    with pytest.raises(CheckpointError, match=r"could not hold activation.*load_quantized\(path, Keeps, activation="):
        load_quantized(callback.quantized_path, Keeps)
    module = load_quantized(callback.quantized_path, Keeps, activation=nn.ReLU())
    assert module.vocabulary == {"a": 1, "b": [2, 3]}
    assert isinstance(module.hparams.activation, nn.ReLU)


def test_a_file_of_hyper_parameters_is_refused_by_name(fitted, tmp_path):
    callback, _, _ = fitted
    (tmp_path / "hparams.yaml").write_text("width: 16\n")
    more = {"hparams_file": tmp_path / "hparams.yaml"}
    with pytest.raises(CheckpointError, match=r"it is quantized .*hparams_file=.*hparams\.yaml' is not read"):
        MixedIn.load_from_checkpoint(callback.quantized_path, **more)
    assert isinstance(MixedIn.load_from_checkpoint(callback.float_path, weights_only=True, **more), MixedIn)


def test_the_written_spec_gives_the_same_tensors_when_run_again(fitted, tmp_path):
    callback, _, _ = fitted
    again = TinyQCallback(callback.plan.to_spec(), when="test_start", report=False, dirpath=tmp_path / "again")
    run = trainer(tmp_path, again)
    run.test(Net(), loader(), ckpt_path=callback.float_path, verbose=False, weights_only=True)
    ours, theirs = (torch.load(path, weights_only=True) for path in (callback.quantized_path, again.quantized_path))
    assert all(torch.equal(value, theirs["state_dict"][name]) for name, value in ours["state_dict"].items())
    assert ours["tinyq"]["plan"] == theirs["tinyq"]["plan"]


def test_the_same_run_gives_the_same_bytes(tmp_path):
    contents = []
    for name in ("one", "two"):
        torch.manual_seed(0)
        callback = TinyQCallback("w8a32", report=False)
        trainer(tmp_path / name, callback, enable_checkpointing=False).fit(Net(), loader(), loader(seed=1))
        contents.append(Path(callback.quantized_path).read_bytes())
    assert contents[0] == contents[1]


def test_remote_paths_work(tmp_path):
    callback = TinyQCallback("w8a32", report=False, dirpath="memory://models/run")
    trainer(tmp_path, keeper(tmp_path), callback).fit(Net(), loader(), loader(seed=1))
    assert callback.quantized_path == "memory://models/run/w8a32-epoch=1-step=12.ckpt"
    assert_bit_equal(load_quantized(callback.quantized_path, Net), in_memory(callback))
