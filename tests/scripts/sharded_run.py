"""Run by test_sharded.py in two processes: fits of a sharded model, and what each rank saw written to a file.

python sharded_run.py ROOT fsdp|tensor|both
"""

import json
import sys
from pathlib import Path

import torch
from lightnings import ModelCheckpoint, ModelParallelStrategy, seed_everything
from models import trainer
from ranks import leave_group_at_exit
from sharded_net import Points, ShardedNet
from torch.distributed.tensor import DTensor

from tinyq_lightning import TinyQCallback
from tinyq_lightning.trainer import gather


class FailsOnRankOne(gather.Gather):
    """Fails where the other rank waits for a part of a tensor."""

    def answer(self):
        gather._broadcast(None)
        raise KeyError("answer on rank 1")


def fit(root, name, how, weights, distributed=True, **arguments):
    data, tensor = (2, 1) if how == "fsdp" else (1, 2)
    strategy = ModelParallelStrategy(data, tensor, save_distributed_checkpoint=distributed)
    folder = root / name
    callback = TinyQCallback(["w8a32", "w8a8"], weights=weights, **{"report": False, **arguments})
    keeper = ModelCheckpoint(dirpath=folder, monitor="val_loss")
    run = trainer(folder, keeper, callback, strategy=strategy, devices=2, max_epochs=1)
    seed_everything(1, verbose=False)
    module = ShardedNet(how=how)
    run.fit(module, datamodule=Points())
    state = module.state_dict()
    parts = [key for key, value in state.items() if isinstance(value, DTensor)]
    whole = {key: value.full_tensor() if key in parts else value for key, value in state.items()}
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
        from tinyq_lightning.trainer import sharded

        sharded.Gather = FailsOnRankOne
        fit(root, "fails", how, "current")


leave_group_at_exit()

if __name__ == "__main__":
    main()
