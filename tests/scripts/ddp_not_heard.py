"""Run by test_ddp.py in two processes: one fails while the other waits for it and cannot be interrupted, as with NCCL.

python ddp_not_heard.py ROOT RANK
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
from ddp_failures import Fails
from models import loader, trainer
from ranks import leave_group_at_exit

from tinyq_lightning import TinyQCallback
from tinyq_lightning.trainer import ranks


def main() -> None:
    ranks._can_be_closed = lambda: False
    ranks.PATIENCE = timedelta(seconds=3)
    torch.set_num_threads(1)
    root, rank = Path(sys.argv[1]), int(sys.argv[2])
    run = trainer(root, TinyQCallback("w8a32", report=False), strategy="ddp", devices=2, max_epochs=1)
    run.fit(Fails("loop", rank), loader(), loader(seed=1))
    print("went on")


leave_group_at_exit()

if __name__ == "__main__":
    main()
