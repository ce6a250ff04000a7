"""Run by test_sharded.py in two processes: fits of a sharded model, and what each rank saw written to a file.

python sharded_run.py ROOT fsdp|tensor|both
"""

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from lightnings import ModelCheckpoint, ModelParallelStrategy, seed_everything
from models import trainer
from ranks import leave_group_at_exit
from sharded_net import Points, ShardedNet
from torch.distributed.tensor import DTensor

from tinyq_lightning import TinyQCallback
from tinyq_lightning.plan import users_path
from tinyq_lightning.trainer import gather, ranks, sharded


class FailsOnRankOne(gather.Gather):
    """Fails where the other rank waits for a part of a tensor."""

    def answer(self):
        gather._broadcast(None)
        raise KeyError("answer on rank 1")


class PartFailsOnRankOne(gather.Gather):
    """Cannot give a part of a tensor."""

    def _part(self, name):
        if dist.get_rank() == 1:
            raise KeyError("part on rank 1")
        return super()._part(name)


def fails_in_the_end(module):
    """Called by rank 0 alone, while the other waits to be asked."""
    raise KeyError("twin on rank 0")


def fit(root, name, how, weights, distributed=True, **arguments):
    data, tensor = (2, 1) if how == "fsdp" else (1, 2)
    strategy = ModelParallelStrategy(data, tensor, save_distributed_checkpoint=distributed)
    folder = root / name
    callback = TinyQCallback(["w8a32", "w8a8"], weights=weights, **{"report": False, **arguments})
    keeper = ModelCheckpoint(dirpath=folder, monitor="val_loss")
    run = trainer(folder, keeper, callback, strategy=strategy, devices=2, max_epochs=1)
    seed_everything(1, verbose=False)
    module = ShardedNet(how=how)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run.fit(module, datamodule=Points())
    said = [str(each.message) for each in told if "without a comparison" in str(each.message)]
    (folder / f"said-{run.global_rank}.json").write_text(json.dumps(said))
    state = module.state_dict()
    parts = [key for key, value in state.items() if isinstance(value, DTensor)]
    whole = {users_path(key): value.full_tensor() if key in parts else value for key, value in state.items()}
    if run.is_global_zero:
        torch.save(whole, folder / "whole.pt")
    outcome = {
        "error": callback.error and str(callback.error),
        "paths": callback.quantized_paths,
        "float_path": callback.float_path,
        "plan": callback.plan and callback.plan.to_list(),
        "sizes": {key: float(value) for key, value in run.callback_metrics.items() if key.startswith("tinyq/size")},
        "types": [type(layer).__name__ for layer in (module.up, module.odd, module)],
        "hooks": len(module.head._forward_pre_hooks),
        "split": len(parts),
        "alive": run.strategy.broadcast("rank 0 is heard"),
    }
    (root / f"{name}-{run.global_rank}.json").write_text(json.dumps(outcome))


def main() -> None:
    root, how = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    fit(root, "folder", how, "best", report=True)
    fit(root, "file", how, "best", distributed=False)
    fit(root, "current", how, "current")
    if how == "fsdp":
        sharded.Gather = FailsOnRankOne
        fit(root, "fails", how, "current")
        ranks._can_be_closed = lambda: False  # as with NCCL: the calls to one another must stay in order
        sharded.Gather = PartFailsOnRankOne
        fit(root, "part", how, "current")
        sharded.unsharded_twin = fails_in_the_end
        fit(root, "twin", how, "current")


leave_group_at_exit()

if __name__ == "__main__":
    main()
