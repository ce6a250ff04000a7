"""What cannot work is refused before the first training step."""

from __future__ import annotations

import re
import warnings

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from models import Net, keeper, loader, trainer
from omegaconf import OmegaConf
from torch import nn
from torchmetrics import MeanSquaredError, MetricCollection

from tinyq_lightning import TinyQCallback, load_quantized, quantize
from tinyq_lightning.errors import CheckpointError, ModelError, SpecError


class Counts(Net):
    """Counts its training steps."""

    def __init__(self, width: int = 16):
        super().__init__(width)
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return super().training_step(batch, batch_idx)


def refused(root, callback, kind, match, module=None, *, loaders=1, callbacks=(), **settings):
    module = module or Counts()
    run = trainer(root, callback, *callbacks, **settings)
    with pytest.raises(kind, match=match):
        run.fit(module, loader(shuffle=True), [loader(seed=1)] * loaders)
    assert module.steps == 0


class Narrow(Counts):
    """Each row has one weight, so int8 and its scale are no smaller."""

    def __init__(self):
        super().__init__()
        del self.body
        self.head = nn.Linear(1, 4)

    def forward(self, x):
        return self.head(x[:, :1])


def test_a_model_without_anything_to_quantize(tmp_path):
    refused(tmp_path, TinyQCallback(), ModelError, r"nothing to quantize \(head: int8 is no smaller", Narrow())


class SavesWhatWasTrained(Counts):
    """Leaves a frozen layer out of its state dict."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.strict_loading = False

    def state_dict(self, *args, **kwargs):
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "frozen" not in name}


def test_a_state_dict_that_leaves_out_a_layer(tmp_path):
    match = r"state_dict\(\) of SavesWhatWasTrained leaves out frozen, so a quantized file would lack the weights"
    refused(tmp_path, TinyQCallback(), ModelError, match, SavesWhatWasTrained())
    module, callback = SavesWhatWasTrained(), TinyQCallback(exclude=["frozen"], report=False)
    trainer(tmp_path, callback).fit(module, loader(), loader(seed=1))
    assert callback.quantized_path


@pytest.mark.parametrize("settings", [{}, {"save": False}, {"fast_dev_run": True}])
def test_a_folder_below_a_file(tmp_path, settings):
    (tmp_path / "file").write_text("")
    settings = dict(settings)
    save = settings.pop("save", True)
    callback = TinyQCallback(dirpath=str(tmp_path / "file" / "below"), save=save, report=False)
    if save and not settings:
        refused(tmp_path, callback, SpecError, r"dirpath '.*below' cannot be written to")
    else:  # nothing is written, so nothing is refused
        trainer(tmp_path, callback, **settings).fit(Net(), loader(), loader(seed=1))
        assert callback.results


@pytest.mark.parametrize("dirpath", [None, "files"])
def test_a_name_that_another_kind_of_file_has(tmp_path, dirpath):
    folder = tmp_path / (dirpath or "")
    folder.mkdir(exist_ok=True)
    (folder / "mine.ckpt").write_text("a file of the user's")
    callback = TinyQCallback(dirpath=dirpath and str(folder), filename="mine", report=False)
    match = r"mine\.ckpt: there is a file already that is not a quantized"
    refused(tmp_path, callback, CheckpointError, match, callbacks=[keeper(tmp_path)])
    assert (folder / "mine.ckpt").read_text() == "a file of the user's"


def test_a_root_folder_that_takes_no_files(tmp_path):
    (tmp_path / "file").write_text("")
    callback = TinyQCallback(report=False)
    refused(
        tmp_path / "file", callback, SpecError, "default_root_dir .* cannot be written to", enable_checkpointing=False
    )


class ReadOnly(MemoryFileSystem):
    """A remote file system that refuses to write."""

    protocol = ("readonly",)

    def _open(self, path, mode="rb", **kwargs):
        if mode != "rb":
            raise PermissionError("no rights to write")
        return super()._open(path, mode, **kwargs)


def test_a_remote_folder_that_takes_no_files(tmp_path):
    fsspec.register_implementation("readonly", ReadOnly, clobber=True)
    refused(tmp_path, TinyQCallback(dirpath="readonly://share"), SpecError, "PermissionError: no rights to write")
    refused(tmp_path, TinyQCallback(dirpath="nosuch://share"), SpecError, "nosuch")


class NoRename(MemoryFileSystem):
    """A remote file system that takes files, and neither moves nor copies them, as the end of a save would."""

    protocol = ("norename",)

    def mv(self, path1, path2, **kwargs):
        raise OSError("nothing is renamed here")


def test_a_remote_folder_that_renames_no_file(tmp_path):
    fsspec.register_implementation("norename", NoRename, clobber=True)
    refused(tmp_path, TinyQCallback(dirpath="norename://share"), SpecError, "nothing is renamed here")
    assert not fsspec.filesystem("norename").find("/share")


@pytest.mark.parametrize("name", ["a\0b", "a" * 300])
def test_a_name_that_no_file_can_have(name):
    with pytest.raises(SpecError, match="is no name of a file"):
        TinyQCallback(filename=name)


def test_the_trial_leaves_nothing_behind(tmp_path):
    class Stops(Net):
        def on_train_start(self):
            assert not (tmp_path / "deep").exists()
            assert not fsspec.filesystem("memory").exists("/deep")
            raise RuntimeError("stop here")

    for folder in (str(tmp_path / "deep" / "er"), "memory://deep/er"):
        with pytest.raises(RuntimeError, match="stop here"):
            trainer(tmp_path, TinyQCallback(dirpath=folder)).fit(Stops(), loader(), loader(seed=1))


def test_hyper_parameters_that_no_file_can_hold_are_named_before_training(tmp_path):
    class Configured(Counts):
        def __init__(self, config):
            super().__init__()
            self.save_hyperparameters({"config": config, "hidden": 3, "activation": torch.relu})

    unresolved = OmegaConf.create({"lr": "${nowhere.lr}"})
    for config, names in ((1, "Configured.activation."), (unresolved, "Configured.config.lr, Configured.activation.")):
        run = trainer(tmp_path, TinyQCallback(report=False), max_epochs=0)
        with pytest.warns(UserWarning, match=re.escape(f"will not have these hyper-parameters: {names}")):
            run.fit(Configured(config), loader(), loader(seed=1))


class Scheduled(Net):
    """Has a hyper-parameter that a Trainer takes out before it runs, since it cannot be pickled."""

    def __init__(self, width=3, schedule=None, net=None):
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.filterwarnings("ignore:Attribute .* removed from hparams:UserWarning")
@pytest.mark.parametrize("given", [{"schedule": lambda step: 0.5}, {"net": {"depth": 2, "act": lambda x: x}}])
def test_hyper_parameters_that_the_trainer_removes_are_asked_for_by_name(tmp_path, given):
    ((name, value),) = given.items()
    dropped = "net.act" if name == "net" else name
    callback = TinyQCallback(report=False, strict=True)
    with pytest.warns(UserWarning, match=rf"will not have these hyper-parameters: Scheduled\.{dropped}\."):
        trainer(tmp_path, keeper(tmp_path), callback).fit(Scheduled(**given), loader(), loader(seed=1))
    assert (
        "hyper_parameters" not in torch.load(callback.float_path)
        or name not in (torch.load(callback.float_path)["hyper_parameters"])
    )
    with pytest.raises(CheckpointError, match=f"the file could not hold {dropped}, which Scheduled was made with"):
        load_quantized(callback.quantized_path, Scheduled)
    loaded = load_quantized(callback.quantized_path, Scheduled, **given)
    assert loaded.hparams[name] is value
    assert loaded.hparams["width"] == 3


@pytest.mark.parametrize(("when", "said"), [("fit_end", "will not have"), ("test_start", "were left out")])
def test_what_no_file_can_hold_is_named_once(tmp_path, when, said):
    class Configured(Counts):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"activation": torch.relu})

        def on_save_checkpoint(self, checkpoint):
            checkpoint["vocabulary"] = object()

    run = trainer(tmp_path, TinyQCallback(["w8a32", "w8a8"], when=when, report=False), max_epochs=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(Configured(), loader(), loader(seed=1)) if when == "fit_end" else run.test(Configured(), loader())
    told = [str(each.message) for each in caught if "activation" in str(each.message)]
    assert len(told) == 1
    assert said in told[0]
    assert sum("vocabulary" in str(each.message) for each in caught) == 1


def test_a_monitor_without_the_index_of_its_dataloader(tmp_path):
    meant = r"Did you mean 'val_acc/dataloader_idx_0'"
    named = keeper(tmp_path, monitor="val_acc/dataloader_idx_0")
    refused(tmp_path, TinyQCallback(monitor="val_acc"), SpecError, meant, loaders=2, callbacks=[named])
    budget = TinyQCallback(monitor="val_acc", max_drop=0.01)
    refused(tmp_path, budget, SpecError, meant, loaders=2, num_sanity_val_steps=2)


def test_without_a_sanity_check_the_first_validation_tells_the_index(tmp_path):
    run = trainer(tmp_path, TinyQCallback(monitor="val_acc", max_drop=0.01), num_sanity_val_steps=0)
    with pytest.raises(SpecError, match="val_acc/dataloader_idx_1"):
        run.fit(Net(), loader(shuffle=True), [loader(seed=1), loader(seed=3)])
    assert run.current_epoch == 0


def test_a_mode_that_contradicts_the_model_checkpoint_of_the_metric(tmp_path):
    callback = TinyQCallback("w8a32", monitor="val_acc", mode="max", max_drop=0.5, report=False, save=False)
    told = r"mode='max' contradicts ModelCheckpoint\(monitor='val_acc', mode='min'\)"
    lowest = keeper(tmp_path / "lowest", mode="min")
    refused(tmp_path, callback, SpecError, told, callbacks=[lowest])
    both = trainer(tmp_path, keeper(tmp_path), lowest, callback, max_epochs=1)
    both.fit(Net(), loader(shuffle=True), loader(seed=1))
    assert callback.search.met, "one keeps the highest, the other the lowest"


def test_a_model_checkpoint_that_keeps_the_worst_by_the_metrics_own_word(tmp_path):
    lowest = keeper(tmp_path / "lowest", mode="min")
    told = r"mode='max', by the torchmetrics object that is logged as 'val_acc', contradicts ModelCheckpoint"
    budget = TinyQCallback("w8a32", monitor="val_acc", max_drop=0.5, save=False)
    refused(tmp_path, budget, SpecError, told, callbacks=[lowest], num_sanity_val_steps=2)
    plain = TinyQCallback("w8a32", report=False, save=False)
    with pytest.warns(UserWarning, match=r"mode='min'\) keeps the worst checkpoint .* higher_is_better=True") as warned:
        trainer(tmp_path, lowest, plain, max_epochs=2).fit(Net(), loader(shuffle=True), loader(seed=1))
    assert sum("keeps the worst" in str(each.message) for each in warned) == 1
    quiet = {"report": False, "save": False}
    current, of_loss = TinyQCallback(weights="current", **quiet), TinyQCallback(monitor="val_loss", **quiet)
    loss = keeper(tmp_path / "loss", monitor="val_loss", mode="min")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*keeps the worst")
        for callbacks in ([lowest, current], [keeper(tmp_path), lowest, plain], [lowest, loss, of_loss]):
            trainer(tmp_path, *callbacks, max_epochs=1).fit(Net(), loader(shuffle=True), loader(seed=1))


class Squares(Counts):
    """Logs a torchmetrics object of which less is better."""

    def __init__(self):
        super().__init__()
        self.val_mse = MeanSquaredError()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.val_mse(self(batch[0])[:, 0], batch[1].float())
        self.log("val_mse", self.val_mse)


class Computed(Counts):
    """Logs the values of a collection, which torchmetrics objects know the direction of."""

    def __init__(self):
        super().__init__()
        self.errors = MetricCollection({"mse": MeanSquaredError()}, prefix="val/")

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.errors.update(self(batch[0])[:, 0], batch[1].float())

    def on_validation_epoch_end(self):
        self.log_dict(self.errors.compute())
        self.errors.reset()


@pytest.mark.parametrize("mode", ["max", "min", None])
def test_a_mode_that_contradicts_the_collection_whose_values_are_logged(tmp_path, mode):
    callback = TinyQCallback("w8a32", monitor="val/mse", mode=mode, max_drop="50%", report=False)
    settings = {"num_sanity_val_steps": 2, "enable_checkpointing": False}
    if mode == "max":
        refused(
            tmp_path, callback, SpecError, "mode='max' contradicts .*higher_is_better=False", Computed(), **settings
        )
    else:
        trainer(tmp_path, callback, **settings).fit(Computed(), loader(), loader(seed=1))
        assert callback.search.met


@pytest.mark.parametrize("mode", ["max", "min", None])
def test_a_mode_that_contradicts_the_metric(tmp_path, mode):
    callback = TinyQCallback("w8a32", monitor="val_mse", mode=mode, max_drop="50%", report=False)
    settings = {"num_sanity_val_steps": 2, "enable_checkpointing": False}
    if mode == "max":
        refused(tmp_path, callback, SpecError, "mode='max' contradicts .*higher_is_better=False", Squares(), **settings)
    else:
        trainer(tmp_path, callback, **settings).fit(Squares(), loader(), loader(seed=1))
        assert callback.search.met


@pytest.mark.parametrize(
    ("max_drop", "monitor", "mode", "warns"),
    [
        (1, "val_acc", None, True),
        ("100%", "val_acc", "max", True),
        (0.99, "val_acc", "max", False),
        ("1%", "val_acc", "max", False),
        (1, "val_loss", "min", False),
    ],
)
def test_a_budget_that_limits_nothing_is_told_of_once(tmp_path, max_drop, monitor, mode, warns):
    budget = {"monitor": monitor, "mode": mode, "max_drop": max_drop}
    run = trainer(tmp_path, TinyQCallback(**budget, save=False, report=False))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(Net(), loader(shuffle=True), loader(seed=1))
    assert sum("limits nothing where" in str(each.message) for each in caught) == warns


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_whose_codes_the_training_leaves_are_named_unless_they_are_frozen(tmp_path, frozen):
    module, callback = Net(), TinyQCallback(report=False)
    quantize(module, {"exclude": ["head"]})
    module.body.requires_grad_(not frozen)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, callback).fit(module, loader(), loader(seed=1))
    told = [str(each.message) for each in caught if "will not change the weights" in str(each.message)]
    assert callback.quantized_path
    assert len(told) == (not frozen)
    assert frozen or ("body.0, body.2, which are codes" in told[0] and "module.body.0.requires_grad_(False)" in told[0])
