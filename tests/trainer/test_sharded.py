"""Two CPU processes that share a model: FSDP2, tensor parallelism, and both."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from lightnings import LightningModule, ModelParallelStrategy
from models import Net, trainer
from ranks import run_on_ranks, written_by_ranks
from sharded_net import ShardedNet
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tinyq_lightning import TinyQCallback, load_quantized, quantize
from tinyq_lightning.command import main
from tinyq_lightning.errors import EvaluationError, TrainerError
from tinyq_lightning.file import read_checkpoint
from tinyq_lightning.trainer.twin import unsharded_twin


class Whole(LightningModule):
    """The layers of ShardedNet, in a class that shards nothing."""

    def __init__(self, width: int = 16, how: str = ""):
        super().__init__()
        for name, child in ShardedNet(width).named_children():
            setattr(self, name, child)
        self.register_buffer("shift", torch.zeros(1))
        self.register_buffer("scale", torch.ones(1), persistent=False)

    forward = ShardedNet.forward


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp", "tensor", "both"])
def test_a_sharded_model_leaves_the_file_of_the_gathered_one(tmp_path, how, capsys):
    done = run_on_ranks("sharded_run.py", tmp_path, how)
    assert done.stdout.count("TinyQ: 2 methods for 4 layers") == 1, "rank 0 shows the report"
    for name in ("folder", "file", "current"):
        ranks = written_by_ranks(tmp_path, name)
        assert ranks[0] == ranks[1]
        seen = ranks[0]
        assert (seen["error"], seen["hooks"], list(seen["paths"])) == (None, 1, ["w8a32", "w8a8"])
        assert seen["split"] > 0, "the module is sharded as before"
        assert (seen["float_path"] is None) == (name == "current")
        assert Path(seen["float_path"] or tmp_path).is_dir() == (name != "file")
        gathered = torch.load(tmp_path / name / "whole.pt", weights_only=True)
        for method, path in seen["paths"].items():
            model = Whole()
            model.load_state_dict(gathered)
            plan = quantize(model, method)
            content = read_checkpoint(path)
            assert [row["method"] for row in content["tinyq"]["plan"]] == [each.method for each in plan]
            state = model.state_dict()
            assert state.keys() == content["state_dict"].keys()
            assert all(torch.equal(value, content["state_dict"][key]) for key, value in state.items())
            x = torch.randn(3, 8)
            for kind in (Whole, ShardedNet):
                assert torch.equal(load_quantized(path, kind)(x), model.eval()(x))
    folder, written = written_by_ranks(tmp_path, "folder")[0]["float_path"], tmp_path / "offline.ckpt"
    assert main(["quantize", folder, "--model", "sharded_net:ShardedNet", "--output", str(written)]) == 0
    offline = read_checkpoint(written)
    online = read_checkpoint(written_by_ranks(tmp_path, "folder")[0]["paths"]["w8a32"])
    assert offline["tinyq"]["digests"] == online["tinyq"]["digests"], "the same content by command and callback"
    if how == "fsdp":
        the_command_that_is_told_gives_both_numbers(tmp_path, folder, capsys)
        for name, reason in (("fails", "answer on rank 1"), ("part", "part on rank 1"), ("twin", "twin on rank 0")):
            ranks = written_by_ranks(tmp_path, name)
            assert ranks[0]["error"] == ranks[1]["error"]
            assert reason in ranks[0]["error"]
            assert ranks[1]["alive"], "the processes can still talk to one another"


def the_command_that_is_told_gives_both_numbers(root, folder, capsys):
    (said,), others = written_by_ranks(root / "folder", "said")
    assert others == [], "rank 0 warns"
    recorded = float(re.search(r"recorded val_loss ([\d.]+) for the float model", said)[1])
    quantized = written_by_ranks(root, "folder")[0]["paths"]["w8a8"]
    command = said.partition("tinyq-lightning ")[2].replace("package.module:Data", "sharded_net:Points")
    capsys.readouterr()
    assert main([*command.replace("QUANTIZED", quantized).split(), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics[folder]["test_loss"] == pytest.approx(recorded, rel=1e-4), "Points tests what it validates"
    assert metrics[quantized]["test_loss"] == pytest.approx(recorded, rel=0.05)
    (said,), _ = written_by_ranks(root / "current", "said")
    assert re.search(r"last validation of the fit gave val_loss [\d.]+ for the float model", said)
    assert "FLOAT QUANTIZED, where FLOAT is what trainer.save_checkpoint" in said


@pytest.mark.parametrize(
    "arguments",
    [
        {"monitor": "val_loss", "mode": "min", "max_drop": 0.1},
        {"never_slower": True},
        {"spec": "w4a32", "calibrate": 2},
        {"export": "pt2"},
    ],
)
def test_what_needs_the_quantized_model_to_run_is_refused_before_training(tmp_path, arguments):
    run = trainer(tmp_path, strategy=ModelParallelStrategy())
    with pytest.raises(EvaluationError, match=r"ModelParallelStrategy no process holds.*max_epochs=0, .*consol"):
        TinyQCallback(**{"spec": "w8a32", **arguments}).on_fit_start(run, Net())


def test_a_test_run_of_a_sharded_model_is_refused_with_the_command(tmp_path):
    run = trainer(tmp_path, strategy=ModelParallelStrategy())
    with pytest.raises(TrainerError, match=r"ModelParallelStrategy.*tinyq-lightning quantize CHECKPOINT --model"):
        TinyQCallback("w8a32", when="test_start").setup(run, Net(), "test")


def test_a_module_that_cannot_be_copied_is_refused_before_training(tmp_path):
    class Stream(Net):
        def __init__(self):
            super().__init__()
            self.stream = (each for each in range(3))

    with pytest.raises(TrainerError, match=r"cannot be copied.*generator.*tinyq-lightning quantize"):
        unsharded_twin(Stream())


def test_a_twin_has_no_memory_and_the_module_is_as_before():
    module = Net()
    module.tied = module.head
    before = {name: dict(vars(each)) for name, each in module.named_modules()}
    twin = unsharded_twin(module)
    assert {name: dict(vars(each)) for name, each in module.named_modules()} == before
    assert all(parameter.is_meta for parameter in twin.parameters())
    assert twin.tied is twin.head
    assert isinstance(twin.head, nn.Linear)
    assert twin.state_dict().keys() == module.state_dict().keys()


def test_a_twin_is_without_the_wrappers_that_checkpoints_do_not_name():
    module = Net()
    module.body[0] = torch.compile(checkpoint_wrapper(module.body[0]), backend="eager")
    wrapped = module.body[0]
    twin = unsharded_twin(module)
    assert twin.state_dict().keys() == Net().state_dict().keys()
    assert type(twin.body[0]) is nn.Linear
    assert module.body[0] is wrapped


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["best", "current"])
def test_rank_0_takes_the_codes_and_a_layer_and_the_others_nothing(tmp_path, weights, capsys):
    done = run_on_ranks("sharded_memory.py", tmp_path, 12, 4096, weights)
    with capsys.disabled():
        print(*(line for line in done.stdout.splitlines() if line.startswith("rank")), sep="\n")
    first, other = written_by_ranks(tmp_path, "memory")
    assert first["peak_mb"] - first["before_mb"] < first["codes_mb"] + 2 * first["layer_mb"]
    assert other["peak_mb"] - other["before_mb"] < other["layer_mb"]
