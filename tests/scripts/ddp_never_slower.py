"""Run by test_never_slower.py: a fit and a test on two gloo processes, on which timers would differ.

python ddp_never_slower.py ROOT
"""

import json
import sys
from pathlib import Path

import torch
from lightnings import seed_everything
from models import CLASSES, Net, loader, trainer
from ranks import leave_group_at_exit

import tinyq_lightning.search.timing
from tinyq_lightning import TinyQCallback


def main() -> None:
    root = sys.argv[1]
    seed_everything(1, verbose=False)
    torch.set_num_threads(1)
    timed = []

    def time_call(layers, call):
        timed.append(call)
        return 1.0, 2.0 if layers[0][1].out_features == CLASSES else 0.5

    tinyq_lightning.search.timing.time_call = time_call
    settings = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": True, "max_epochs": 0}
    for stage in ("fit", "test"):
        when = {"fit": "fit_end", "test": "test_start"}[stage]
        weights = "current" if when == "fit_end" else None
        callback = TinyQCallback("w8a32", when=when, weights=weights, never_slower=True, report=False)
        run = trainer(root, callback, **settings)
        if stage == "fit":
            run.fit(Net(), loader(), loader(seed=1))
        else:
            run.test(Net(), loader(seed=2), verbose=False)
        seen = {"plan": callback.plan.to_list(), "results": callback.results, "timed": len(timed)}
        Path(root, f"{stage}-{run.global_rank}.json").write_text(json.dumps(seen))


leave_group_at_exit()

if __name__ == "__main__":
    main()
