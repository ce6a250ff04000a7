"""The loop that is run again meets the Trainer, the callbacks and the data that it knows, or says that it does not."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import safetensors.torch
import torch
from lightnings import Callback, CombinedLoader, CSVLogger, ModelCheckpoint
from models import Net, has_trained, keeper, loader, trainer
from safetensors.torch import load_file
from torch import nn

from tinyq_lightning import TinyQCallback
from tinyq_lightning.errors import EvaluationError


def quiet(**kwargs):
    return TinyQCallback("w8a8", report=False, save=False, **kwargs)


ASKED = {
    "epochs": lambda module: module.trainer.max_epochs,
    "learning rate": lambda module: module.optimizers().param_groups[0]["lr"],
    "schedule": lambda module: module.lr_schedulers().get_last_lr(),
    "best score": lambda module: str(module.trainer.checkpoint_callback.best_model_score),
    "callback by type": lambda module: [c.monitor for c in module.trainer.callbacks if isinstance(c, ModelCheckpoint)],
    "logger": lambda module: (module.logger.name, module.logger.version, module.logger.root_dir, module.logger.log_dir),
    "what runs": lambda module: module.trainer.state.fn,
    "folders": lambda module: (module.trainer.log_dir, module.logger.save_dir),
    "training batches": lambda module: module.trainer.num_training_batches,
    "the user's own": lambda module: module.trainer.my_setting,
    "training loss": lambda module: float(module.trainer.callback_metrics["train_loss"]),
    "logged loss": lambda module: float(module.trainer.logged_metrics["train_loss"]),
}


def test_hooks_are_answered_as_in_the_fit(tmp_path):
    told = []

    class Asks(Net):
        def on_validation_epoch_end(self):
            told.append({name: ask(self) for name, ask in ASKED.items()})

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.01)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    class Notes(Callback):
        def on_fit_end(self, trainer, pl_module):
            self.answers = {name: ask(pl_module) for name, ask in ASKED.items()}

    notes = Notes()
    run = trainer(
        tmp_path, notes, quiet(), keeper(tmp_path), logger=CSVLogger(tmp_path, "mine", "v7"), num_sanity_val_steps=0
    )
    run.my_setting = [1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_TRAINER_MAX_EPOCHS", "7")
        patch.setenv("PL_TRAINER_LIMIT_VAL_BATCHES", "0")
        run.fit(Asks(), loader(), loader(seed=1))
    assert len(told) == 2 + 2
    assert told[-1] == told[-2] == notes.answers


class Steps(Net):
    """Steps a scheduler and writes to the Trainer in validation."""

    def on_validation_epoch_end(self):
        self.lr_schedulers().step()
        self.trainer.my_list.append(1)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def test_schedules_and_what_is_on_the_trainer_are_as_without_the_callback(tmp_path):
    found = []
    for callbacks in ([], [quiet()]):
        run = trainer(tmp_path, *callbacks, num_sanity_val_steps=0)
        run.my_list = []
        run.fit(Steps(), loader(), loader(seed=1))
        (config,) = run.lr_scheduler_configs
        found.append((run.my_list, config.scheduler.last_epoch, run.optimizers[0].param_groups[0]["lr"]))
    assert found[0] == found[1]


class Normalizes(Callback):
    def __init__(self):
        self.batches = 0

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.batches += 1
        batch[0].sub_(3.0)

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        batch[0].sub_(3.0)


class Writes(Callback):
    def on_validation_epoch_end(self, trainer, pl_module):
        assert not has_trained(trainer), "a callback that changes no batch is not to be run again"


class LogsItsData(Net):
    def validation_step(self, batch, batch_idx):
        self.log("val_data", self(batch[0]).mean() + batch[0].mean())

    def test_step(self, batch, batch_idx):
        self.log("test_data", self(batch[0]).mean() + batch[0].mean())


def test_callbacks_that_change_batches_do_so_for_each_model(tmp_path):
    module, normalizes, callback = LogsItsData(), Normalizes(), quiet(weights="current")
    run = trainer(tmp_path, normalizes, Writes(), callback, num_sanity_val_steps=0)
    run.fit(module, loader(), loader(seed=1))
    assert callback.results["val_data"]["float"] == pytest.approx(float(run.callback_metrics["val_data"]))
    assert normalizes.batches == 2 * 6, "two epochs of the fit"
    expected = trainer(tmp_path, Normalizes()).test(module, loader(seed=2), verbose=False)[0]["test_data"]
    for callbacks in ([Normalizes(), quiet(when="test_start")], [quiet(when="test_start"), Normalizes()]):
        trainer(tmp_path, *callbacks).test(module, loader(seed=2), verbose=False)
        ours = next(each for each in callbacks if isinstance(each, TinyQCallback))
        assert ours.results["test_data"]["float"] == pytest.approx(expected)


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle"])
def test_combined_loaders_keep_their_mode(tmp_path, mode):
    class Pairs(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            kinds.append(type(batch).__name__)
            self.log("val_loss", self(batch["a"][0]).mean(), batch_size=32)

    kinds, callback = [], quiet(weights="current")
    run = trainer(tmp_path, callback, num_sanity_val_steps=0, max_epochs=1)
    run.fit(Pairs(), loader(), CombinedLoader({"a": loader(seed=1), "b": loader(seed=2, count=64)}, mode=mode))
    assert callback.results["val_loss"]["float"] == pytest.approx(float(run.callback_metrics["val_loss"]))
    assert kinds == kinds[: len(kinds) // 3] * 3


class NeedsAll(Net):
    """Cannot end an epoch that was cut short."""

    def on_validation_epoch_start(self):
        self.rows = 0

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.rows += len(batch[1])

    def on_validation_epoch_end(self):
        assert self.rows == 192, "all of the data is needed"


def test_a_look_at_the_first_batches_does_not_end_the_epoch(tmp_path):
    callback = TinyQCallback("w8a8", report="full")
    trainer(tmp_path, keeper(tmp_path), callback, num_sanity_val_steps=0).fit(NeedsAll(), loader(), loader(seed=1))
    assert callback.quantized_path


class TakesTheFirstParameter(Net):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 16, bias=False)
        self.head = nn.Linear(16, 4, bias=False)

    def test_step(self, batch, batch_idx):
        next(iter(()))


def test_a_step_that_raises_stop_iteration_is_an_error_and_not_the_end_of_the_data(tmp_path):
    with pytest.raises(EvaluationError, match=r"test_step raised StopIteration in batch 0"):
        trainer(tmp_path, quiet(when="test_start")).test(TakesTheFirstParameter(), loader(), verbose=False)


@pytest.mark.parametrize(
    ("hook", "told"),
    [
        ("on_before_batch_transfer", "transfer_batch_to_device, or on_before_ or on_after_batch_transfer,"),
        ("on_after_batch_transfer", "transfer_batch_to_device, or on_before_ or on_after_batch_transfer,"),
        ("on_validation_batch_start", "on_validation_batch_start, or that of a callback,"),
        ("on_validation_batch_end", "on_validation_batch_end, or that of a callback,"),
    ],
)
def test_so_is_a_hook_of_a_batch_that_raises_it(tmp_path, hook, told):
    class Stops(Net):
        pass

    def stop(module, *args):
        if type(module.head) is not nn.Linear:
            next(iter(()))
        return args[0]

    setattr(Stops, hook, stop)
    callback = quiet(weights="current", strict=True)
    with pytest.raises(EvaluationError, match=f"Stops.{told} raised StopIteration in batch 0"):
        trainer(tmp_path, callback, max_epochs=1).fit(Stops(), loader(), loader(seed=1))


class LogsWhenFloat(Net):
    def validation_step(self, batch, batch_idx):
        self(batch[0])
        if type(self.head) is nn.Linear:
            self.log("val_loss", 1.0)


def test_a_quantized_model_that_logs_nothing_is_an_error(tmp_path):
    with pytest.raises(EvaluationError, match="float model logged val_loss, and the quantized model logged none"):
        trainer(tmp_path, quiet(weights="current", strict=True)).fit(LogsWhenFloat(), loader(), loader(seed=1))


def test_hooks_set_on_the_instance_are_run_and_stay(tmp_path):
    module, called = Net(), []
    module.on_test_epoch_end = lambda: called.append("test")
    module.on_validation_epoch_end = lambda: called.append("validation")
    hooks = dict(vars(module))
    trainer(tmp_path, quiet(weights="current"), num_sanity_val_steps=0, max_epochs=1).fit(module, loader(), loader())
    trainer(tmp_path, quiet(when="test_start")).test(module, loader(), verbose=False)
    assert called == ["validation"] * 3 + ["test"] * 2
    assert all(vars(module)[name] is hooks[name] for name in ("on_test_epoch_end", "on_validation_epoch_end"))


def test_a_file_that_the_test_writes_has_the_lines_of_one_test(tmp_path):
    class WritesLines(Net):
        def test_step(self, batch, batch_idx):
            super().test_step(batch, batch_idx)
            self.kept.write(f"{batch_idx}\n")

    module = WritesLines()
    with (tmp_path / "kept.txt").open("w") as module.kept:
        trainer(tmp_path, quiet(when="test_start")).test(module, loader(), verbose=False)
    assert (tmp_path / "kept.txt").read_text().split() == [str(batch) for batch in range(6)]


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1, "persistent_workers": True}], ids=["inline", "persistent"])
def test_limits_and_several_loaders_hold_for_each_model(tmp_path, workers):
    class Counts(Net):
        def test_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("test_rows", float(len(batch[1])), reduce_fx="sum")
            self.log("test_mean", self(batch[0]).mean())

    callback = quiet(when="test_start")
    loaders = [loader(seed=2, **workers), loader(seed=3, count=64, **workers)]
    trainer(tmp_path, callback, limit_test_batches=3).test(Counts(), loaders, verbose=False)
    for index, rows in enumerate((96, 64)):
        values = callback.results[f"test_rows/dataloader_idx_{index}"]
        assert (values["float"], values["w8a8"]) == (rows, rows)


class SavesByHand(Net):
    """Keeps the latest weights in files of its own, as users without a ModelCheckpoint do."""

    def on_validation_epoch_end(self):
        folder = Path(self.trainer.default_root_dir)
        self.trainer.save_checkpoint(folder / "by_trainer.ckpt")
        torch.save(self.state_dict(), folder / "by_torch.pt")
        torch.save(self.state_dict(), f=str(folder / "named.pt"))
        safetensors.torch.save_file(
            {name: value.clone() for name, value in self.state_dict().items()}, folder / "by_name.safetensors"
        )
        torch.save(self.state_dict(), buffer := io.BytesIO())
        buffer.seek(0)
        self.log("val_entries", float(len(torch.load(buffer, weights_only=True))))


def test_files_that_hooks_of_the_users_save_hold_what_the_fit_gave(tmp_path):
    callback = TinyQCallback("w8a8", report=False, strict=True)
    module = SavesByHand()
    trainer(tmp_path, callback, max_epochs=1).fit(module, loader(), loader(seed=1))
    state = module.state_dict()
    for name in ("by_torch.pt", "named.pt", "by_name.safetensors", "by_trainer.ckpt"):
        path = tmp_path / name
        held = load_file(path) if "safetensors" in name else torch.load(path, weights_only=True)
        held = held.get("state_dict", held)
        assert held.keys() == state.keys()
        assert all(torch.equal(held[each], state[each]) for each in state)
    assert callback.results["val_entries"]["w8a8"] > callback.results["val_entries"]["float"]
    assert torch.save.__module__ == "torch.serialization"
