"""Copies and pickles of the module and of the callback, during and after a run, take nothing of the run along."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from lightnings import Callback, EMAWeightAveraging, StochasticWeightAveraging
from models import Data, Net, keeper, trainer

from tinyq_lightning import TinyQCallback


class Locked(Data):
    """Data that cannot be copied, as an open database cannot."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class Copies(Callback):
    """Copies the module at one hook in each way that people copy modules."""

    def __init__(self, hook):
        self.attributes, self.bytes = set(), 0
        setattr(self, hook, self.take)

    def take(self, trainer, module, *args, **kwargs):
        self.attributes = set(vars(copy.deepcopy(module)))
        pickle.loads(pickle.dumps(module))
        torch.save(module, file := io.BytesIO())
        self.bytes = len(file.getvalue())


@pytest.mark.parametrize("hook", ["setup", "on_train_start", "on_validation_end", "on_train_end", "on_fit_end"])
@pytest.mark.parametrize("first", [True, False])
def test_copies_of_the_module_in_a_fit_are_those_without_the_callback(tmp_path, hook, first):
    found = []
    for ours in ([TinyQCallback(report=False)], []):
        copies = Copies(hook)
        callbacks = [*ours, copies] if first else [copies, *ours]
        trainer(tmp_path, *callbacks).fit(Net(), datamodule=Locked())
        found.append((copies.attributes, copies.bytes))
    assert found[0] == found[1]


@pytest.mark.parametrize("averages", [lambda: StochasticWeightAveraging(1e-2), EMAWeightAveraging])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_callbacks_that_copy_the_module_start_before_and_after_ours(tmp_path, averages, first):
    callback = TinyQCallback(report=False)
    callbacks = [callback, averages()] if first else [averages(), callback]
    trainer(tmp_path, keeper(tmp_path), *callbacks).fit(Net(), datamodule=Locked())
    assert callback.error is None
    assert callback.results


def test_hooks_that_a_user_set_on_the_instance_are_called_and_stay(tmp_path):
    module, called = Net(), []
    hook = module.on_load_checkpoint = lambda checkpoint: called.append("load")
    callback = TinyQCallback(report=False)
    trainer(tmp_path, keeper(tmp_path), callback).fit(module, datamodule=Locked())
    assert called == ["load"]
    run = trainer(tmp_path, TinyQCallback())
    for path in (callback.float_path, callback.quantized_path):
        run.test(module, datamodule=Locked(), ckpt_path=path, verbose=False, weights_only=True)
    assert called == ["load"] * 3
    assert vars(module)["on_load_checkpoint"] is hook


def test_a_callback_pickles_small_and_with_its_results(tmp_path):
    class Holds(Net):
        def __init__(self, callback):
            super().__init__()
            self.save_hyperparameters(ignore=["callback"])
            self.hparams["callback"] = callback

    class Weighs(Callback):
        def on_train_start(self, trainer, module):
            self.pickled = pickle.dumps(ours)

    ours, weighs = TinyQCallback("w8a32", save=False, report=False), Weighs()
    trainer(tmp_path, ours, weighs).fit(Holds(ours), datamodule=Locked())
    for pickled in (weighs.pickled, pickle.dumps(ours)):
        assert len(pickled) < 10_000
    for other in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert other.results == ours.results
        assert list(other.plan) == list(ours.plan)
        trainer(tmp_path, other).fit(Net(), datamodule=Locked())
        assert other.error is None
