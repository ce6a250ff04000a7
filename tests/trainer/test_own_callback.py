"""A class of the user's that derives from the callback works as the callback does, wherever the module holds it."""

from __future__ import annotations

import pytest
import torch
from models import Net, keeper, loader, trainer

from tinyq_lightning import TinyQCallback


class Own(TinyQCallback):
    """Counts, and has hooks of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, report=False, strict=True, **kwargs)
        self.steps, self.seen = 0, []

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        self.seen.append(batch_idx)

    def on_validation_end(self, trainer, pl_module):
        super().on_validation_end(trainer, pl_module)
        self.seen.append("end")

    def on_test_batch_start(self, trainer, pl_module, *args, **kwargs):
        super().on_test_batch_start(trainer, pl_module, *args, **kwargs)
        self.seen.append("test")


class Holds(Net):
    def __init__(self, held=None):
        super().__init__()
        self.save_hyperparameters()
        self.held = held

    def validation_step(self, batch, index):
        self.held[0].steps += 1
        return super().validation_step(batch, index)

    def test_step(self, batch, index):
        self.held[0].steps += 1
        return super().test_step(batch, index)


def run(root, callback, make, when):
    torch.manual_seed(0)
    module, made = make(), trainer(root, keeper(root), callback, num_sanity_val_steps=0)
    made.fit(module, loader(), loader(seed=1))
    if when == "test_start":
        made.test(module, loader(seed=2), verbose=False)


@pytest.mark.parametrize("when", ["fit_end", "test_start"])
@pytest.mark.filterwarnings("ignore:.*plain data only:UserWarning", "ignore:Attribute 'held':UserWarning")
def test_what_a_run_sets_stays_in_a_callback_that_the_module_holds_and_its_counts_are_the_runs_own(tmp_path, when):
    own, given = Own("w8a32", when=when), TinyQCallback("w8a32", when=when, report=False)
    run(tmp_path / "own", own, lambda: Holds([own]), when)
    run(tmp_path / "given", given, Net, when)
    assert own.quantized_path is not None
    assert own.plan.to_list() == given.plan.to_list()
    assert own.plans.keys() == given.plans.keys()
    assert own.results == given.results
    assert (own.float_path is None) == (given.float_path is None)
    assert own.steps == len(own.seen) - own.seen.count("end") > 0, "repeated evaluations are counted"


class Turns(Own):
    """Its hooks change what the model sees."""

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        batch[0].neg_()

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        super().on_test_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        batch[0].neg_()


@pytest.mark.parametrize("when", ["fit_end", "test_start"])
def test_batches_that_a_hook_of_such_a_class_changes_are_changed_for_both_models(tmp_path, when):
    turns, given = Turns("w8a32", when=when), TinyQCallback("w8a32", when=when, report=False)
    for each in (turns, given):
        run(tmp_path / type(each).__name__, each, Net, when)
    name = "val_acc" if when == "fit_end" else "test_acc"
    for column in ("float", "w8a32"):
        assert turns.results[name][column] < 0.5 < given.results[name][column]
