"""Saves checkpoints in child processes, kills each at a random moment, and looks at what is there.

python kill_while_saving.py FOLDER KILLS; prints one word for each kill, and what is left over at the end.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from tinyq_lightning import quantize
from tinyq_lightning.errors import CheckpointError
from tinyq_lightning.file.checkpoint import make_checkpoint, read_checkpoint, write_checkpoint

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
path = folder / "w8a32-best.ckpt"


def content(epoch):
    torch.manual_seed(epoch)
    model = nn.Sequential(nn.Linear(1500, 1500), nn.Linear(1500, 1500))
    plan = quantize(model)
    base = {"epoch": epoch, "global_step": 1, "pytorch-lightning_version": "2.6.6"}
    return make_checkpoint(base, model.state_dict(), plan, {}, "0" * 64, None)


torch.set_num_threads(1)
contents = [content(0), content(1)]
begin = time.perf_counter()
write_checkpoint(contents[0], path)
took = time.perf_counter() - begin
dice = random.Random(0)
for _ in range(kills):
    child = os.fork()
    if child == 0:
        while True:
            for each in contents:
                write_checkpoint(each, path)
    time.sleep(dice.uniform(0, 4 * took))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        print("whole", read_checkpoint(path)["epoch"])
    except CheckpointError as error:
        print("HALF", error)
    others = {each.name for each in folder.iterdir()} - {path.name}
    print(
        "hidden" if all(name.startswith(".") and name.endswith(".tinyq-tmp") for name in others) else f"OTHER {others}"
    )
    print(len(others), "left")
write_checkpoint(contents[1], path)
print("at the end:", *(each.name for each in folder.iterdir()))
