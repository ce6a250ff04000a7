"""Run by test_ddp.py in two processes: rank 1 ends while rank 0 waits for it.

python ended.py ROOT exit|kill|interrupt validating|gathering
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightnings import ModelParallelStrategy
from models import Net, loader, trainer
from ranks import leave_group_at_exit
from sharded_net import Points, ShardedNet

from tinyq_lightning import TinyQCallback
from tinyq_lightning.layers import QuantizedLinear
from tinyq_lightning.trainer import gather, sharded


def end():
    if dist.get_rank() == 1:
        if sys.argv[2] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise SystemExit(3) if sys.argv[2] == "exit" else KeyboardInterrupt


class Ends(Net):
    """Does so once the quantized model is validated."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        if isinstance(self.head, QuantizedLinear):
            end()
        super().validation_step(batch, batch_idx)


class EndsGathering(gather.Gather):
    """Does so once a part of a tensor is asked for."""

    def _part(self, name):
        end()
        return super()._part(name)


def main() -> None:
    torch.set_num_threads(1)
    root, callback = Path(sys.argv[1]), TinyQCallback("w8a32", weights="current", report=False)
    settings = {"devices": 2, "max_epochs": 1}
    if sys.argv[3] == "gathering":
        sharded.Gather = EndsGathering
        run = trainer(root, callback, strategy=ModelParallelStrategy(2, 1), **settings)
        run.fit(ShardedNet(), datamodule=Points())
    else:
        run = trainer(root, callback, strategy="ddp", **settings)
        run.fit(Ends(), loader(), loader(seed=1))
    print("went on")


leave_group_at_exit()

if __name__ == "__main__":
    main()
