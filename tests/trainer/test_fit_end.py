"""What the callback promises of a fit: two honest numbers, a file, and nothing of the user's changed."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from lightnings import (
    NAMESPACE,
    CSVLogger,
    EMAWeightAveraging,
    LightningModule,
    SingleDeviceStrategy,
    StochasticWeightAveraging,
    WeightAveraging,
    seed_everything,
)
from models import CLASSES, FEATURES, Blobs, Data, Net, NetOfHooks, has_trained, keeper, loader, loops_of, trainer
from torch import nn

from tinyq_lightning import TinyQCallback, TinyQError, load_quantized, quantize
from tinyq_lightning.errors import CheckpointError, EvaluationError, SpecError, TrainerError
from tinyq_lightning.layers.linear import QuantizedLinear
from tinyq_lightning.trainer import choose_float_weights, files_before_fit


def fit(root, *callbacks, module=None, data=None, keep=True, ckpt_path=None, **settings):
    seed_everything(1, verbose=False)
    module = module if module is not None else Net()
    keepers = [keeper(root)] if keep else []
    run = trainer(root, *keepers, *callbacks, **settings)
    if data is None:
        run.fit(module, loader(shuffle=True), loader(seed=1), ckpt_path=ckpt_path)
    else:
        run.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return run, module


def validated(root, module, data=None, **settings):
    run = trainer(root, **settings)
    if data is None:
        return run.validate(module, loader(seed=1), verbose=False)[0]
    return run.validate(module, datamodule=data, verbose=False)[0]


def quiet(*args, **kwargs):
    return TinyQCallback(*args, report=False, **kwargs)


# Which weights, and where


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_current_weights_lie_where_the_run_keeps_its_checkpoints_and_of_averages_the_best_one_tells(tmp_path):
    best, current = TinyQCallback("w8a32", strict=True), TinyQCallback("w8a32", weights="current", strict=True)
    with pytest.warns(UserWarning, match="the best checkpoint is quantized, without what Stochastic.*'current'"):
        run, module = fit(tmp_path, best, current, StochasticWeightAveraging(1e-2, 0.5), max_epochs=4)
    assert {Path(each.quantized_path).parent for each in (best, current)} == {Path(run.checkpoint_callback.dirpath)}
    assert best.quantized_path != current.quantized_path
    notes = [json.loads(Path(each.quantized_path).with_suffix(".json").read_text())["note"] for each in (best, current)]
    assert "without what StochasticWeightAveraging averages" in notes[0]
    assert notes[1] == "the weights at the end of training"
    averaged = Net()
    averaged.load_state_dict(module.state_dict())
    want = quantize(averaged, "w8a32") and averaged.state_dict()
    found = load_quantized(current.quantized_path, Net).state_dict()
    assert all(torch.equal(found[name], value) for name, value in want.items())
    alone = quiet("w8a32", weights="current", strict=True)
    fit(tmp_path / "alone", alone, keep=False, enable_checkpointing=False)
    assert Path(alone.quantized_path).parent == tmp_path / "alone"


# Nothing of the user's changes


def test_fit_leaves_every_weight_bit_equal_to_a_run_without_the_callback(tmp_path):
    _, module = fit(tmp_path / "with", quiet("w8a32"))
    after = torch.rand(4)
    _, plain = fit(tmp_path / "without")
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), plain.state_dict().values(), strict=True)
    )
    assert torch.equal(after, torch.rand(4)), "the random state after the fit is another"


@pytest.mark.filterwarnings("ignore:Found 1 module")
def test_fit_leaves_the_same_module_objects_flags_hooks_and_attributes(tmp_path):
    module = NetOfHooks()
    handle = module.head.register_forward_hook(lambda *_: None)
    module.body[0].eval()
    module.body[2].weight.requires_grad_(False)
    before = {name: id(each) for name, each in module.named_modules()}
    parameters = {name: id(each) for name, each in module.named_parameters()}
    run, _ = fit(tmp_path, quiet("w8a32"), module=module)
    assert {name: id(each) for name, each in module.named_modules()} == before
    assert {name: id(each) for name, each in module.named_parameters()} == parameters
    assert module.training
    assert not module.body[0].training
    assert not module.body[2].weight.requires_grad
    assert list(module.head._forward_hooks) == [handle.id]
    assert module.trainer is run
    assert "on_load_checkpoint" not in vars(module)
    validations = 2 + run.num_sanity_val_steps / 6  # of six batches each; the comparison's are not counted
    assert module.batches == 6 * validations


def test_metric_states_are_put_back(tmp_path):
    class Keeps(Net):
        def on_train_end(self):
            self.val_acc.update(torch.eye(CLASSES), torch.arange(CLASSES))

    _, module = fit(tmp_path, quiet("w8a32"), module=Keeps())
    assert module.val_acc.compute() == 1
    assert int(module.val_acc.tp.sum()) == CLASSES


@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")
def test_generators_of_dataloaders_are_put_back(tmp_path):
    states = []
    for callbacks in ([quiet("w8a32")], []):
        generator = torch.Generator().manual_seed(7)
        val = loader(seed=1, shuffle=True, generator=generator)
        seed_everything(1, verbose=False)
        run = trainer(tmp_path, *callbacks)
        run.fit(Net(), loader(shuffle=True), val)
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_two_fits_in_a_row_train_as_without_the_callback(tmp_path):
    modules = []
    for name, callbacks in (("with", [quiet("w8a32")]), ("without", [])):
        run, module = fit(tmp_path / name, *callbacks)
        run.fit_loop.max_epochs = 4
        run.fit(module, loader(shuffle=True), loader(seed=1))
        modules.append(module)
    ours, plain = (module.state_dict().values() for module in modules)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_best_last_and_resuming_work_and_never_pick_a_quantized_file(tmp_path):
    callback = quiet("w8a32", weights="last")
    run = trainer(tmp_path, keeper(tmp_path, save_last=True), callback)
    run.fit(Net(), loader(shuffle=True), loader(seed=1))
    assert Path(callback.quantized_path).name == "w8a32-last.ckpt"
    for which in ("best", "last"):
        run.test(ckpt_path=which, dataloaders=loader(seed=2), verbose=False)
        assert "w8a32" not in run.ckpt_path
    other = trainer(tmp_path, keeper(tmp_path, save_last=True), quiet("w8a32"), max_epochs=3)
    other.fit(Net(), loader(shuffle=True), loader(seed=1), ckpt_path="last")
    assert other.current_epoch == 3


# The numbers


@pytest.mark.parametrize("data", [None, Blobs], ids=["dataloaders", "datamodule"])
@pytest.mark.parametrize("kind", [Net, NetOfHooks])
def test_results_are_those_of_a_separate_validation(tmp_path, kind, data):
    callback = quiet("w8a8")
    fit(tmp_path, callback, module=kind(), data=data and data())
    floats = kind.load_from_checkpoint(callback.float_path, weights_only=True)
    for module, key in ((floats, "float"), (load_quantized(callback.quantized_path, kind), "w8a8")):
        separate = validated(tmp_path, module, data and data())
        assert {name: values[key] for name, values in callback.results.items()} == separate
    for values in callback.results.values():
        assert values["delta"] == values["w8a8"] - values["float"]


def test_several_dataloaders_are_kept_apart(tmp_path):
    callback = quiet("w8a32")
    loaders = [loader(seed=1), loader(seed=3, count=64)]
    run = trainer(tmp_path, keeper(tmp_path, monitor="val_acc/dataloader_idx_0"), callback)
    run.fit(Net(), loader(shuffle=True), loaders)
    separate = trainer(tmp_path).validate(load_quantized(callback.quantized_path, Net), loaders, verbose=False)
    wanted = {name: value for each in separate for name, value in each.items()}
    assert {name: values["w8a32"] for name, values in callback.results.items()} == wanted
    assert "tinyq/val_acc/dataloader_idx_1/delta" in run.callback_metrics


@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")
def test_a_shuffled_validation_set_is_seen_in_the_same_order_twice(tmp_path):
    class OfOrder(Net):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("val_order", batch[0][0, 0] * (batch_idx + 1) + torch.rand(()))

    callback = quiet("w8a32")
    run = trainer(tmp_path, callback)
    run.fit(OfOrder(), loader(shuffle=True), loader(seed=1, shuffle=True))
    assert callback.results["val_order"]["delta"] == 0


@pytest.mark.parametrize("limit", [2, 0.5])
def test_limits_of_the_fit_hold_for_the_comparison(tmp_path, limit):
    callback = quiet("w8a32")
    fit(tmp_path, callback, limit_val_batches=limit)
    floats = Net.load_from_checkpoint(callback.float_path, weights_only=True)
    separate = validated(tmp_path, floats, limit_val_batches=limit)
    assert callback.results["val_loss"]["float"] == separate["val_loss"]


@pytest.mark.parametrize("averaging", [WeightAveraging, EMAWeightAveraging])
def test_averaged_weights_are_those_that_are_quantized_and_left(tmp_path, averaging):
    callback = quiet("w8a32")
    _, module = fit(tmp_path / "with", callback, averaging())
    _, plain = fit(tmp_path / "without", averaging())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))
    floats = Net.load_from_checkpoint(callback.float_path, weights_only=True)
    assert callback.results["val_loss"]["float"] == validated(tmp_path, floats)["val_loss"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_every_precision_keeps_float32_scales(tmp_path, precision):
    callback = quiet("w8a32")
    _, module = fit(tmp_path, callback, precision=precision)
    assert abs(callback.results["val_acc"]["delta"]) < 0.05
    state = torch.load(callback.quantized_path, weights_only=True)["state_dict"]
    assert state["head.scales"].dtype == torch.float32
    assert state["head.bias"].dtype == module.head.bias.dtype
    assert isinstance(load_quantized(callback.quantized_path, Net).head, QuantizedLinear)


class Epochs(Net):
    """Logs how far the fit has come."""

    def on_validation_epoch_end(self):
        self.log("val_epoch", float(self.trainer.current_epoch))
        self.log("val_step", float(self.global_step))


def test_current_epoch_in_the_users_hooks_is_that_of_the_fit(tmp_path):
    callback = quiet("w8a32")
    run, _ = fit(tmp_path, callback, module=Epochs())
    assert callback.results["val_epoch"]["float"] == run.current_epoch
    assert callback.results["val_step"]["float"] == run.global_step


class Scheduled(Epochs):
    """Has an entry for each epoch of the fit, and none for the epoch after the last."""

    schedule = (0.5, 1.0, 0.25)

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.log("val_scheduled", self.schedule[self.current_epoch])


@pytest.mark.parametrize("keeps", [False, True])
def test_a_schedule_with_an_entry_for_each_epoch_is_asked_for_the_last(tmp_path, keeps):
    callback = quiet("w8a32", strict=True)
    fit(tmp_path, callback, keep=False, module=Scheduled(), max_epochs=3, enable_checkpointing=keeps)
    assert callback.results["val_epoch"]["float"] == callback.results["val_epoch"]["w8a32"] == 2
    assert callback.results["val_scheduled"]["float"] == 0.25


def test_a_schedule_with_an_entry_for_each_epoch_is_asked_for_that_of_the_best_checkpoint(tmp_path):
    callback = quiet("w8a32", strict=True)
    kept = keeper(tmp_path, monitor="val_scheduled")
    run, _ = fit(tmp_path, callback, kept, keep=False, module=Scheduled(), max_epochs=3)
    assert callback.results["val_epoch"]["float"] == 1
    assert callback.results["val_step"]["float"] == run.global_step * 2 / 3
    assert callback.results["val_scheduled"]["float"] == kept.best_model_score == 1


class Sometimes(Net):
    """Logs what is costly in every fourth epoch, and in the last."""

    def on_validation_epoch_end(self):
        if self.current_epoch % 4 == 0 or self.current_epoch == self.trainer.max_epochs - 1:
            self.log("val_costly", float(self.current_epoch))


class NothingElse(Sometimes):
    def validation_step(self, batch, batch_idx):
        pass


@pytest.mark.parametrize(("kind", "budget"), [(Sometimes, True), (NothingElse, False), (NothingElse, True)])
def test_a_metric_that_some_epochs_log_is_measured_as_in_an_epoch_that_did(tmp_path, kind, budget):
    limit = {"monitor": "val_costly", "mode": "max", "max_drop": 0.5} if budget else {}
    callback = quiet("w8a32", strict=True, **limit)
    fit(tmp_path, callback, keeper(tmp_path, monitor="val_costly"), keep=False, module=kind(), max_epochs=3)
    assert callback.results["val_costly"] == {"float": 2.0, "w8a32": 2.0, "delta": 0.0}


def test_a_module_that_logs_nothing_is_validated_once(tmp_path):
    loops_of.clear()

    class Silent(WithoutValidation):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            loops_of["Silent"] += has_trained(self.trainer)

    with pytest.warns(UserWarning, match="validation_step logged no metric"):
        fit(tmp_path, quiet("w8a32", strict=True), keep=False, module=Silent())
    assert loops_of["Silent"] == 6, "batches"


def test_a_second_try_that_fails_costs_nothing(tmp_path):
    class Breaks(NothingElse):
        def validation_step(self, batch, batch_idx):
            if has_trained(self.trainer) and self.current_epoch == 2:
                raise ValueError("not again")

    callback = quiet("w8a32", strict=True)
    with pytest.warns(UserWarning, match="validation_step logged no metric"):
        fit(tmp_path, callback, keeper(tmp_path, monitor="val_costly"), keep=False, module=Breaks(), max_epochs=3)
    assert callback.quantized_path


def test_a_look_up_that_fails_in_any_epoch_is_told_as_it_failed_first(tmp_path):
    class Fails(Net):
        def validation_step(self, batch, batch_idx):
            if has_trained(self.trainer):
                raise KeyError(f"no entry for {self.current_epoch}")

    callback = quiet("w8a32", save=False)
    with pytest.warns(UserWarning, match="KeyError: 'no entry for 2'"):
        fit(tmp_path, callback, keep=False, module=Fails(), max_epochs=2)
    assert "no entry for 2" in str(callback.error)


# The loop of users who do unusual things


def test_setup_and_data_preparation_are_not_run_again(tmp_path):
    class Rebuilds(Net):
        def setup(self, stage):
            self.head = nn.Linear(self.hparams.width, CLASSES)

    data, callback = Blobs(), quiet("w8a32")
    fit(tmp_path, callback, module=Rebuilds(), data=data)
    assert data.setups == 1
    assert "val_dataloader" not in vars(data)
    assert isinstance(load_quantized(callback.quantized_path, Net).head, QuantizedLinear)


def test_layers_made_in_configure_model_are_quantized_and_loaded(tmp_path):
    class Late(Net):
        def __init__(self, width=16):
            super().__init__(width)
            self.head = None

        def configure_model(self):
            if self.head is None:
                self.head = nn.Linear(self.hparams.width, CLASSES)

    callback = quiet("w8a32")
    fit(tmp_path, callback, module=Late())
    assert isinstance(load_quantized(callback.quantized_path, Late).head, QuantizedLinear)


def test_hooks_may_use_the_logger_and_the_datamodule(tmp_path):
    class Uses(Net):
        def on_validation_epoch_end(self):
            self.logger.experiment.add_text("note", "text")
            assert os.path.isdir(self.trainer.default_root_dir)
            assert self.trainer.datamodule.setups == 1

    from lightnings import TensorBoardLogger

    callback = quiet("w8a32")
    fit(tmp_path, callback, module=Uses(), data=Blobs(), logger=TensorBoardLogger(tmp_path))
    assert callback.results["val_acc"]


def test_validation_by_persistent_workers_can_be_run_again(tmp_path):
    callback = quiet("w8a32")
    run = trainer(tmp_path, callback)
    val = loader(seed=1, num_workers=1, persistent_workers=True)
    run.fit(Net(), loader(shuffle=True), val)
    assert callback.results["val_acc"]["float"] > 0.5


# Which weights


@pytest.mark.parametrize("weights", ["best", "last", "current"])
def test_the_weights_asked_for_are_quantized(tmp_path, weights):
    callback = quiet("w8a32", weights=weights)
    saver = keeper(tmp_path, save_last=True, monitor="val_loss", mode="max")  # the worst, so that best is not last
    run = trainer(tmp_path, saver, callback)
    module = Net()
    run.fit(module, loader(shuffle=True), loader(seed=1))
    expected = {"best": saver.best_model_path, "last": saver.last_model_path, "current": None}[weights]
    assert callback.float_path == expected
    source = Net.load_from_checkpoint(expected, weights_only=True) if expected else module
    quantized = load_quantized(callback.quantized_path, Net)
    assert torch.allclose(quantized.head.weight, source.head.weight, atol=float(quantized.head.scales.max()))
    assert torch.equal(quantized.head.bias, source.head.bias)


def test_the_users_hook_that_loads_a_checkpoint_sees_all_of_it(tmp_path):
    class Reads(Net):
        def on_load_checkpoint(self, checkpoint):
            del checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
            seen.append(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"])

    seen: list[int] = []
    callback = quiet("w8a32")
    fit(tmp_path, callback, module=Reads())
    assert len(seen) == 1
    assert callback.error is None
    assert "optimizer_states" not in torch.load(callback.quantized_path, weights_only=True)


def test_monitor_picks_among_several_checkpoints(tmp_path):
    callback = quiet("w8a32", monitor="val_loss")
    by_loss = keeper(tmp_path, monitor="val_loss", mode="min", filename="by-loss")
    fit(tmp_path, by_loss, callback)
    assert callback.float_path == by_loss.best_model_path


def test_without_a_checkpoint_the_current_weights_are_written_below_the_root(tmp_path, capsys):
    callback = TinyQCallback("w8a32")
    run, module = fit(tmp_path, callback, keep=False, enable_checkpointing=False)
    assert callback.float_path is None
    assert callback.quantized_path == str(tmp_path / "w8a32-epoch=1-step=12.ckpt")
    assert "no best checkpoint was saved" in capsys.readouterr().out
    content = torch.load(callback.quantized_path, weights_only=True)
    last = run.current_epoch - 1  # the Trainer has counted past it
    assert (content["epoch"], content["global_step"]) == (last, run.global_step)
    assert torch.equal(content["state_dict"]["head.bias"], module.head.bias)


@pytest.mark.parametrize("settings", [{"max_epochs": 0}, {"check_val_every_n_epoch": 5}])
def test_runs_that_hardly_train_still_end_with_a_file(tmp_path, settings):
    callback = quiet("w8a32")
    fit(tmp_path, callback, **settings)
    assert set(callback.results["val_acc"]) == {"float", "w8a32", "delta"}
    assert isinstance(load_quantized(callback.quantized_path, Net).head, QuantizedLinear)


class CountsItsLoaders(Data):
    asked = 0
    reads = 0.0

    def val_dataloader(self):
        self.asked += 1
        self.reads = float(torch.rand(1))
        return super().val_dataloader()


class OfAUser(TinyQCallback):
    """A class that is not the package's."""


@pytest.mark.parametrize("kind", [TinyQCallback, OfAUser])
def test_a_fit_that_never_validated_has_no_validation_data_afterwards(tmp_path, kind):
    found = []
    for callbacks in ([], [kind("w8a32", report=False, strict=True)]):
        data = CountsItsLoaders()
        settings = {"check_val_every_n_epoch": 5, "num_sanity_val_steps": 0}
        run, _ = fit(tmp_path / str(len(callbacks)), *callbacks, data=data, **settings)
        loop = vars(run.fit_loop.epoch_loop.val_loop)
        of_loaders = [loop[name] for name in ("_seen_batches_per_dataloader", "_last_val_dl_reload_epoch")]
        found.append((data.asked, data.reads, run.val_dataloaders, run.num_val_batches, of_loaders, torch.rand(1)))
    assert found[0] == found[1]
    (callback,) = callbacks
    assert set(callback.results["val_acc"]) == {"float", "w8a32", "delta"}
    assert isinstance(load_quantized(callback.quantized_path, Net).head, QuantizedLinear)


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_fast_dev_run_measures_and_writes_nothing(tmp_path, stage, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callback = TinyQCallback("w8a32", when="fit_end" if stage == "fit" else "test_start")
    run = trainer(tmp_path, callback, fast_dev_run=True)
    if stage == "fit":
        run.fit(Net(), loader(shuffle=True), loader(seed=1))
    else:
        run.test(Net(), loader(seed=2), verbose=False)
    assert callback.results
    assert callback.quantized_path is None
    assert list(tmp_path.iterdir()) == []


class WithoutValidation(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class LogsNothing(WithoutValidation):
    def validation_step(self, batch, batch_idx):
        self.layer(batch[0])


@pytest.mark.parametrize(
    ("kind", "loaders", "limit", "reason"),
    [
        (WithoutValidation, 0, 1.0, "WithoutValidation has no validation_step"),
        (LogsNothing, 1, 1.0, "validation_step logged no metric"),
        (LogsNothing, 1, 0, "limit_val_batches is 0"),
        (LogsNothing, 0, 1.0, "there is no validation dataloader"),
    ],
)
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_without_numbers_the_file_is_written_with_a_warning_that_says_why(tmp_path, kind, loaders, limit, reason):
    callback = quiet("w8a32")
    run = trainer(tmp_path, callback, limit_val_batches=limit)
    with pytest.warns(UserWarning, match=f"without a comparison: {reason}"):
        run.fit(kind(), loader(), *[loader()] * loaders)
    assert callback.results == {}
    assert isinstance(load_quantized(callback.quantized_path, kind).layer, QuantizedLinear)


# Several callbacks, names of files


def test_two_callbacks_in_one_run_leave_a_file_each(tmp_path):
    callbacks = [quiet("w8a32"), quiet("w8a8"), quiet("w8a8", exclude=["head"])]
    run, _ = fit(tmp_path, *callbacks)
    names = [Path(callback.quantized_path).name for callback in callbacks]
    assert names == ["w8a32-epoch=1-step=12.ckpt", "w8a8-epoch=1-step=12.ckpt", "w8a8-epoch=1-step=12-v1.ckpt"]
    assert {"tinyq/val_acc/w8a32", "tinyq/val_acc/w8a8"} <= set(run.callback_metrics)


def test_callbacks_of_one_method_have_keys_of_their_own_in_every_fit(tmp_path):
    callbacks = [quiet("w8a32"), quiet("w8a32", exclude=["head"]), quiet(["w8a32", "w8a8"]), quiet(when="test_start")]
    run, module = fit(tmp_path, *callbacks)
    for _ in range(2):
        names = [list(callback.plans) for callback in callbacks]
        assert names == [["w8a32"], ["w8a32-v1"], ["w8a32-v2", "w8a8"], []]
        logged = {name: value.item() for name, value in run.callback_metrics.items()}
        for callback in callbacks[:3]:
            for name, plan in callback.plans.items():
                assert logged[f"tinyq/val_loss/{name}"] == pytest.approx(callback.results["val_loss"][name])
                quantized = sum(decision.method != "float" for decision in plan)
                assert logged[f"tinyq/size_mb/{name}"] < logged["tinyq/size_mb/float"]
                assert quantized == (2 if name == "w8a32-v1" else 3)
        assert logged["tinyq/val_loss/delta"] == pytest.approx(callbacks[0].results["val_loss"]["delta"])
        assert logged["tinyq/val_loss/delta/w8a32-v1"] == pytest.approx(callbacks[1].results["val_loss"]["delta"])
        assert callbacks[1].quantized_paths.keys() == {"w8a32-v1"}
        run.fit_loop.max_epochs += 1
        run.fit(module, loader(shuffle=True), loader(seed=1))


def test_dirpath_filename_and_save_false(tmp_path):
    named = quiet("w8a32", dirpath=tmp_path / "deep" / "er", filename="small")
    unsaved = quiet("w8a16", save=False)
    fit(tmp_path, named, unsaved)
    assert named.quantized_path == str(tmp_path / "deep" / "er" / "small.ckpt")
    assert os.path.exists(named.quantized_path)
    assert unsaved.quantized_path is None
    assert unsaved.results["val_acc"]


@pytest.mark.parametrize("filename", ["last", "last.ckpt", "last-v1", "last-w8a32", "a/b", "{epoch}-{val_acc:.2f}"])
def test_a_filename_that_lightning_would_take_for_its_own_is_refused(filename):
    with pytest.raises(SpecError, match="filename"):
        TinyQCallback("w8a32", filename=filename)


def test_a_mixed_plan_is_called_mixed(tmp_path):
    callback = quiet({"method": "w8a32", "rules": [{"match": "head", "method": "w8a8"}]})
    fit(tmp_path, callback)
    assert Path(callback.quantized_path).name.startswith("mixed-")
    assert set(callback.results["val_acc"]) == {"float", "mixed", "delta"}


# Trouble


def test_a_pattern_that_matches_nothing_stops_the_run_before_it_trains(tmp_path):
    class Counts(Net):
        steps = 0

        def training_step(self, batch, batch_idx):
            type(self).steps += 1
            return super().training_step(batch, batch_idx)

    with pytest.raises(SpecError, match=r"'haed' matches no layer\. Did you mean 'head'"):
        fit(tmp_path, quiet("w8a32", exclude=["haed"]), module=Counts())
    assert Counts.steps == 0


def test_a_monitor_that_no_checkpoint_watches_stops_the_run_before_it_trains(tmp_path):
    with pytest.raises(SpecError, match=r"no ModelCheckpoint monitors 'val_ac'\. Did you mean 'val_acc'"):
        fit(tmp_path, quiet("w8a32", monitor="val_ac"))


def test_a_monitor_that_nothing_looks_at_is_told(tmp_path):
    with pytest.warns(UserWarning, match="monitor='val_acc' is not used"):
        trainer(tmp_path, quiet("w8a32", monitor="val_acc"), max_epochs=1).fit(Net(), loader(), loader(seed=1))


def test_a_folder_that_is_a_file_stops_the_run_before_it_trains(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match=r"dirpath .* is a file"):
        fit(tmp_path, quiet("w8a32", dirpath=tmp_path / "file"))


class FailsLater(Net):
    def validation_step(self, batch, batch_idx):
        if has_trained(self.trainer):
            raise ValueError("not again")
        super().validation_step(batch, batch_idx)


def failed(root, callback, **settings):
    """A fit after which something failed: what was warned of it, and the module."""
    with pytest.warns(UserWarning, match="TinyQ: .* failed: ") as caught:
        _, module = fit(root, callback, **settings)
    return "".join(str(each.message) for each in caught if "failed: " in str(each.message)), module


def test_what_fails_after_training_is_a_warning_with_the_reason_and_the_run_ends_as_without_us(tmp_path):
    callback = quiet("w8a32")
    told, module = failed(tmp_path, callback, module=FailsLater())
    best = next(tmp_path.glob("epoch*.ckpt"))
    for text in (told, str(callback.error)):
        assert "not again" in text
        assert "training had finished and its results are safe" in text
        assert str(best) in text
    assert isinstance(callback.error, EvaluationError)
    assert isinstance(callback.error.__cause__, EvaluationError)
    Net.load_from_checkpoint(best, weights_only=True)
    assert module.training
    assert not any(isinstance(each, QuantizedLinear) for each in module.modules())
    assert callback.quantized_path is None
    assert not list(tmp_path.glob("*w8a32*"))


def test_strict_raises_what_fails_after_training(tmp_path):
    callback = quiet("w8a32", strict=True)
    with pytest.raises(EvaluationError, match="not again") as caught:
        fit(tmp_path, callback, module=FailsLater())
    assert callback.error is caught.value
    assert "training had finished and its results are safe" in str(caught.value)


def test_an_error_is_of_its_run_only(tmp_path):
    callback = quiet("w8a32")
    failed(tmp_path, callback, module=FailsLater())
    fit(tmp_path, callback)
    assert callback.error is None
    assert callback.results


def test_without_a_float_checkpoint_the_error_says_that_the_weights_are_in_the_module(tmp_path):
    class FailsOnInt8(Net):
        def validation_step(self, batch, batch_idx):
            if isinstance(self.head, QuantizedLinear):
                raise ValueError("no int8")
            super().validation_step(batch, batch_idx)

    callback = quiet("w8a32")
    told, _ = failed(tmp_path, callback, module=FailsOnInt8(), keep=False, enable_checkpointing=False)
    assert "The trained weights are in the module" in told
    assert "safe" not in told


def test_a_damaged_float_checkpoint_is_named(tmp_path):
    class Damages(Net):
        def on_train_end(self):
            Path(self.trainer.checkpoint_callback.best_model_path).write_bytes(b"damaged")

    told, _ = failed(tmp_path, quiet("w8a32"), module=Damages())
    assert f"{tmp_path}/" in told
    assert "cannot be read: " in told
    assert "No float checkpoint" not in told


def test_a_logger_that_fails_costs_neither_the_file_nor_the_results(tmp_path):
    class Fails(CSVLogger):
        def log_metrics(self, metrics, step=None):
            if any(name.startswith("tinyq/") for name in metrics):
                raise ConnectionError("the server is away")
            super().log_metrics(metrics, step)

    callback = TinyQCallback("w8a32")
    told, _ = failed(tmp_path, callback, logger=Fails(tmp_path))
    assert "Logging the results failed: ConnectionError: the server is away" in told
    assert callback.results["val_acc"]
    assert load_quantized(callback.quantized_path, Net)
    assert Path(callback.quantized_path).with_suffix(".json").exists()


def test_a_file_that_cannot_be_saved_costs_neither_the_results_nor_what_is_logged(tmp_path):
    class WritesAFile(Net):
        def on_train_end(self):
            (tmp_path / "q.ckpt").write_text("a file of the user's")

    callback = quiet("w8a32", filename="q")
    with pytest.warns(UserWarning, match="Saving the quantized checkpoint failed: .*is not overwritten"):
        run, _ = fit(tmp_path, callback, module=WritesAFile())
    assert isinstance(callback.error, CheckpointError)
    assert callback.quantized_path is None
    assert callback.results["val_acc"]
    assert callback.plan
    assert "tinyq/val_acc/w8a32" in run.callback_metrics
    assert (tmp_path / "q.ckpt").read_text() == "a file of the user's"


def test_an_error_holds_no_frames_of_the_run_but_their_text(tmp_path):
    callback = quiet("w8a32")
    failed(tmp_path, callback, module=FailsLater())
    assert "in validation_step" in callback.error.__notes__[0]
    each = callback.error
    while each is not None:
        assert each.__traceback__ is None
        each = each.__cause__ or each.__context__


@pytest.mark.parametrize(("raised", "caught"), [(KeyboardInterrupt, SystemExit), (RuntimeError, RuntimeError)])
def test_an_interrupted_fit_is_left_alone(tmp_path, raised, caught):
    class Stops(Net):
        def on_train_epoch_end(self):
            raise raised("stop")

    module, callback = Stops(), quiet("w8a32")
    with pytest.raises(caught):
        fit(tmp_path, callback, module=module)
    assert callback.quantized_path is None
    assert callback.results == {}
    assert "on_load_checkpoint" not in vars(module)


def test_an_interrupted_fit_says_how_to_quantize_what_there_is(tmp_path, capsys):
    class Stops(Net):
        def on_train_epoch_end(self):
            raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        fit(tmp_path, quiet("w8a32"), module=Stops())
    shown = capsys.readouterr().out
    assert "nothing was quantized" in shown
    assert "when='test_start'" in shown


def test_sharding_strategies_are_refused_with_a_way_out(tmp_path):
    from lightnings import FSDPStrategy

    run = trainer(tmp_path)
    run._accelerator_connector.strategy = FSDPStrategy()  # a Trainer takes it with GPUs only
    with pytest.raises(TrainerError, match=r"FSDPStrategy.*quantize CHECKPOINT .*when='test_start'"):
        quiet("w8a32").setup(run, Net(), "fit")


@pytest.mark.parametrize(
    "arguments",
    [
        {"spec": "w8a23"},
        {"spec": {"metod": "w8a8"}},
        {"spec": "missing.yaml"},
        {"spec": 8},
        {"when": "fit_start"},
        {"weights": "first"},
        {"exclude": "head"},
    ],
)
def test_bad_arguments_are_refused_when_the_callback_is_made(arguments):
    with pytest.raises(TinyQError):
        TinyQCallback(**arguments)


class Planted:
    """An object whose unpickling leaves a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_a_file_that_only_the_resumed_checkpoint_names_is_read_as_plain_data(tmp_path):
    fit(tmp_path / "first")
    resumed, foreign = tmp_path / "resumed.ckpt", tmp_path / "foreign.ckpt"
    content = torch.load(next((tmp_path / "first").glob("epoch*.ckpt")), weights_only=True)
    torch.save(content | {"note": Planted(tmp_path / "trace")}, foreign)
    (state,) = (state for name, state in content["callbacks"].items() if name.startswith("ModelCheckpoint"))
    state |= {"best_model_path": str(foreign), "best_model_score": torch.tensor(9.0), "best_k_models": {}}
    torch.save(content, resumed)
    callback = quiet("w8a32")
    with pytest.warns(UserWarning, match="foreign.ckpt: this run did not write the file"):
        fit(tmp_path / "first", callback, ckpt_path=resumed)
    assert isinstance(callback.error, CheckpointError)
    assert not (tmp_path / "trace").exists()


def test_before_lightning_26_a_damaged_file_of_another_run_is_not_told_to_hold_objects(tmp_path, monkeypatch):
    def load_checkpoint(self, checkpoint_path):
        raise AssertionError("the file is not trusted")

    monkeypatch.setattr(SingleDeviceStrategy, "load_checkpoint", load_checkpoint)
    path, run = tmp_path / "best.ckpt", trainer(tmp_path, keeper(tmp_path))
    run.checkpoint_callback.best_model_path = str(path)
    path.write_bytes(b"PK damaged")
    with pytest.raises(CheckpointError, match="truncated or damaged, or not one of") as told:
        choose_float_weights(run, "best", None, files_before_fit(run))
    assert "objects" not in str(told.value)
    torch.save({"note": Planted(tmp_path / "trace")}, path)
    with pytest.raises(CheckpointError, match=r"did not write the file.*it holds objects"):
        choose_float_weights(run, "best", None, files_before_fit(run))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", ["w8a32", ["w8a32", "w8a8"]], ids=["one", "several"])
def test_a_budget_that_is_not_met_does_not_end_a_fit_where_warnings_are_errors(tmp_path, capsys, method):
    class WorseInInt8(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(any(isinstance(each, QuantizedLinear) for each in self.modules())))

    budget = {"monitor": "val_loss", "mode": "min", "max_drop": 0.0, "max_evals": 1}
    callback = quiet({"method": method, "budget": budget, "weights": "current"})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=re.escape(NAMESPACE))
        fit(tmp_path, callback, module=WorseInInt8(), keep=False)
    assert "budget NOT met" in str(callback.error)
    assert "budget NOT met" in capsys.readouterr().err
    assert callback.results
    assert callback.quantized_path


def test_interrupted_while_it_reports_a_fit_names_the_file_that_is_saved(tmp_path, capsys):
    class Stops(CSVLogger):
        def log_metrics(self, metrics, step=None):
            if any(name.startswith("tinyq/") for name in metrics):
                raise KeyboardInterrupt

    callback = quiet("w8a32")
    with pytest.raises(SystemExit):
        fit(tmp_path, callback, logger=Stops(tmp_path))
    shown = capsys.readouterr().out
    assert "nothing was quantized" not in shown
    assert callback.quantized_path in shown
