"""Weights that a callback puts in for validation, such as an average, are noticed."""

from __future__ import annotations

import warnings

import pytest
from lightnings import Callback, EMAWeightAveraging, ModelCheckpoint
from models import Net, keeper, loader, trainer

from tinyq_lightning import TinyQCallback


class Average(Callback):
    """Keeps an average of the weights and has validation run on it; with ``saved`` the checkpoint holds it as well."""

    def __init__(self, saved):
        self.saved = saved

    def on_fit_start(self, trainer, module):
        self.average = [parameter.detach().clone() for parameter in module.parameters()]

    def on_train_batch_end(self, trainer, module, *args):
        for average, parameter in zip(self.average, module.parameters(), strict=True):
            average.lerp_(parameter.detach(), 0.1)

    def exchange(self, module):
        for average, parameter in zip(self.average, module.parameters(), strict=True):
            parameter.data, average.data = average.data, parameter.data

    def on_validation_start(self, trainer, module):
        self.exchange(module)

    def on_validation_end(self, trainer, module):
        self.exchange(module)

    def on_save_checkpoint(self, trainer, module, checkpoint):
        if self.saved:
            names = [name for name, _ in module.named_parameters()]
            checkpoint["state_dict"] |= dict(zip(names, self.average, strict=True))


def told(root, ours_first, *callbacks, **settings):
    """The warnings of a fit."""
    ours = TinyQCallback("w8a32", report=False, save=False)
    callbacks = (ours, *callbacks) if ours_first else (*callbacks, ours)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(root, *callbacks, **settings).fit(Net(), loader(shuffle=True), loader(seed=1))
    return [str(each.message) for each in caught if "TinyQ" in str(each.message)]


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("interval", [1.0, 0.5])
@pytest.mark.parametrize("checkpoints", ["every", "best", None])
def test_a_callback_that_validates_other_weights_is_noticed(tmp_path, checkpoints, interval, ours_first):
    keeps = {"every": [ModelCheckpoint(tmp_path)], "best": [keeper(tmp_path)], None: []}[checkpoints]
    settings = {"val_check_interval": interval, "enable_checkpointing": bool(keeps)}
    (said,) = told(tmp_path, ours_first, Average(saved=False), *keeps, **settings)
    assert "other weights were put in for validation" in said


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("average", [lambda: Average(saved=True), lambda: EMAWeightAveraging(decay=0.9)])
@pytest.mark.parametrize("monitor", [None, "val_acc"])
def test_an_average_that_is_validated_and_saved_is_not_complained_of(tmp_path, monitor, average, ours_first):
    assert not told(tmp_path, ours_first, average(), ModelCheckpoint(tmp_path, monitor=monitor, mode="max"))


def test_weights_between_two_validations_are_not_complained_of(tmp_path):
    assert not told(
        tmp_path, True, ModelCheckpoint(tmp_path, every_n_train_steps=4), max_epochs=3, val_check_interval=5
    )
