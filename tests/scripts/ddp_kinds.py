"""Run by trainer/test_kinds.py: fit on two gloo processes with layers of every kind.

python ddp_kinds.py ROOT
"""

import json
import sys
from pathlib import Path

import torch
from lightnings import seed_everything
from mixed import RULE, Mixed
from models import keeper, loader, trainer
from ranks import leave_group_at_exit

from tinyq_lightning import TinyQCallback


def main() -> None:
    root = sys.argv[1]
    seed_everything(1, verbose=False)
    torch.set_num_threads(1)
    callback = TinyQCallback({"method": "w8a8", "rules": [RULE]}, report="full")
    run = trainer(root, keeper(root), callback, strategy="ddp", devices=2, max_epochs=1)
    run.fit(Mixed(), loader(shuffle=True), loader(seed=1))
    outcome = {
        "results": callback.results,
        "path": callback.quantized_path,
        "plan": {each.name: (each.kind, each.method) for each in callback.plan},
        "error": callback.error and str(callback.error),
    }
    Path(root, f"fit-{run.global_rank}.json").write_text(json.dumps(outcome))


leave_group_at_exit()

if __name__ == "__main__":
    main()
