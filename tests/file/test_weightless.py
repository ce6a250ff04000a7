"""What is promised of loading: no float weight takes memory, and what comes out is as if it had."""

from __future__ import annotations

import copy
import gc
from contextlib import ExitStack

import pytest
import torch
from lightnings import LightningModule
from models import Net
from torch import nn

from tinyq_lightning import load_quantized, quantize
from tinyq_lightning.errors import CheckpointError, ModelError
from tinyq_lightning.file.checkpoint import make_checkpoint, read_checkpoint, write_checkpoint
from tinyq_lightning.file.loading import _built_weightless
from tinyq_lightning.file.weightless import named_tensors, watched_meta_tensors, without_weights


def saved(module, path):
    """A quantized checkpoint of ``module``, which is quantized in place."""
    plan = quantize(module)
    base = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": "2.6.6",
        "hyper_parameters": dict(module.hparams),
    }
    write_checkpoint(make_checkpoint(base, module.state_dict(), plan, {}, None, None), path)
    return path


class Computes(LightningModule):
    """Buffers that no file holds, constants read back, numbers drawn."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("angles", torch.arange(4.0).sin(), persistent=False)
        self.register_buffer("kept", torch.full((2,), 3.0))
        self.scale = torch.tensor([1.0, 2.0]).sum().item()
        self.alias = self.kept

    def forward(self, x):
        return self.linear(x) * self.angles * self.scale + self.alias.sum()


class Ties(LightningModule):
    """One parameter in two places, and one that the class reaches by a name of its own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.body = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.shortcut = [self.norm.weight]

    def forward(self, x):
        return self.head(self.body(self.norm(self.embed(x)))) * self.shortcut[0].sum()


class Recurrent(LightningModule):
    """Holds weak references to its parameters."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


class ReadsItsWeights(LightningModule):
    """Cannot be built without values."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = self.linear.weight.norm().item()

    def forward(self, x):
        return self.linear(x)


class HidesATeacher(LightningModule):
    """Has parameters that no state dict shows."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        torch.manual_seed(3)
        self.teacher = [copy.deepcopy(nn.Linear(4, 4))]

    def forward(self, x):
        return self.linear(x) + self.teacher[0](x)


CASES = [
    (Computes, torch.ones(2, 4), True),
    (Ties, torch.arange(6), True),
    (Recurrent, torch.ones(1, 3, 4), None),
    (ReadsItsWeights, torch.ones(2, 4), False),
    (HidesATeacher, torch.ones(2, 4), False),
]


@pytest.mark.parametrize(("kind", "x", "weightless"), CASES, ids=[case[0].__name__ for case in CASES])
def test_what_is_loaded_is_what_was_saved_whatever_the_class_does(tmp_path, kind, x, weightless):
    module = kind().eval()
    path = saved(module, tmp_path / "q.ckpt")
    loaded = load_quantized(path, kind)
    assert torch.equal(loaded(x), module(x))
    assert not any(tensor.is_meta for _, tensor in named_tensors(loaded))
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in module.named_parameters()], "ties are as built"
    if weightless is not None:
        assert (_built_weightless(kind, read_checkpoint(path), {}, "the file", False) is not None) == weightless


def test_nothing_that_is_loaded_shares_memory_that_the_class_keeps_apart(tmp_path):
    class Apart(LightningModule):
        def __init__(self):
            super().__init__()
            self.linear, self.one, self.two = nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4)

    module = Apart()
    module.two.weight = module.one.weight
    loaded = load_quantized(saved(module, tmp_path / "q.ckpt"), Apart)
    with torch.no_grad():
        loaded.one.weight.zero_()
    assert torch.equal(loaded.two.weight, torch.ones(4))


def test_parameters_made_outside_the_block_are_real():
    with without_weights():
        inside = nn.Linear(2, 2)
    assert inside.weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize("collected", [False, True])
def test_meta_tensors_of_the_block_alone_are_noticed_and_garbage_is_not(collected):
    older = nn.Linear(2, 2, device="meta")
    gc.collect()
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        with watched_meta_tensors() as leaves_any:
            assert not leaves_any()
            cycle = nn.ModuleList([nn.Linear(2, 2, device="meta")])
            cycle.itself = [cycle]
            if collected:
                gc.collect()
            assert leaves_any()
            del cycle
        assert gc.isenabled() == enabled
    gc.enable()
    with watched_meta_tensors() as leaves_any:
        cycle = [nn.Linear(2, 2, device="meta")]
        cycle.append(cycle)
        del cycle
        assert not leaves_any()
    assert older.weight.is_meta


def test_garbage_is_collected_again_when_the_last_thread_has_loaded():
    first, second = watched_meta_tensors(), watched_meta_tensors()
    with ExitStack() as stack:
        stack.enter_context(first)
        with second:
            stack.close()
            assert not gc.isenabled()
    assert gc.isenabled()


def test_arguments_of_loading(tmp_path):
    module = Net(width=12)
    path = saved(module, tmp_path / "q.ckpt")
    for location in ("cpu", None, torch.device("cpu"), {"cpu": "cpu"}, lambda storage, where: storage):
        loaded = load_quantized(path, "models:Net", location)
        assert type(loaded) is Net
        assert torch.equal(loaded.head.int8_weights, module.head.int8_weights)
    assert load_quantized(path, "models.Net", lr=0.5).hparams.lr == 0.5
    for name, message in (
        ("models:Nett", r"'models:Nett' cannot be imported"),
        ("no.such:Net", "cannot be imported"),
        ("Net", "cannot be imported"),
        ("models:FEATURES", "is neither a class nor a function"),
    ):
        with pytest.raises(ModelError, match=message):
            load_quantized(path, name)


def test_strict_tells_missing_and_unexpected_names_and_lax_builds_real_weights(tmp_path):
    class More(Net):
        def __init__(self, width=16, lr=0.02):
            super().__init__(width, lr)
            torch.manual_seed(5)
            self.extra = nn.LayerNorm(3)

    path = saved(Net(), tmp_path / "q.ckpt")
    with pytest.raises(CheckpointError, match=r"does not fit More.*(?s:.)*extra\.weight"):
        load_quantized(path, More)
    assert torch.equal(load_quantized(path, More, strict=False).extra.weight, torch.ones(3))
