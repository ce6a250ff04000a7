"""Fixtures that every test may use."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from lightnings import NAMESPACE, seed_everything
from models import Net, keeper, loader, trainer

from tinyq_lightning import TinyQCallback

collect_ignore = ["scripts"]  # run by tests, in processes of their own
if NAMESPACE != "lightning.pytorch":  # these run the examples, which import that
    collect_ignore += ["test_configs.py", "test_docs.py", "test_examples.py", "trainer/test_recurrent_run.py"]


@pytest.fixture(autouse=True)
def _same_start():
    """The same seed, one thread, no graphs of other tests, and none of Lightning's notes on hardware in every test."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # the models that were compiled before count towards torch's limit of graphs
    logging.getLogger(NAMESPACE).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    seed_everything(1, verbose=False)


@pytest.fixture
def fitted(tmp_path):
    """A run that ended with a quantized checkpoint: its callback, its module, its Trainer."""
    module, callback = Net(), TinyQCallback("w8a32", report=False)
    run = trainer(tmp_path, keeper(tmp_path), callback)
    run.fit(module, loader(shuffle=True), loader(seed=1))
    return callback, module, run
