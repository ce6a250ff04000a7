"""Run by test_calibrating.py: calibration on two gloo processes, each with batches of its own.

python ddp_calibrate.py ROOT
"""

import json
import sys
from pathlib import Path

import torch
from lightnings import seed_everything
from models import Net, loader, trainer
from ranks import leave_group_at_exit

from tinyq_lightning import TinyQCallback
from tinyq_lightning.search import calibrate
from tinyq_lightning.trainer import calibrating

found: dict[str, list] = {"together": [], "alone": []}


def both(swap, read, combine):
    """``calibrate`` with the sums of both processes, and then with those of this one."""
    chosen = calibrate(swap, read, combine)
    for key, each in (("together", chosen), ("alone", calibrate(swap, read))):
        found[key] = [
            [
                name,
                one.output_error,
                {weight: codes.int8_weights.tolist() for weight, codes in one.codes.items()},
                {bias: values.tolist() for bias, values in one.biases.items()},
            ]
            for name, one in each.items()
        ]
    return chosen


def main() -> None:
    root = sys.argv[1]
    seed_everything(1, verbose=False)
    torch.set_num_threads(1)
    calibrating.calibrate = both
    spec = {"method": "w4a32", "weights": "current", "calibrate": {"batches": 2}}
    callback = TinyQCallback(spec, report=False, save=False, strict=True)
    run = trainer(root, callback, max_epochs=1, strategy="ddp", devices=2, use_distributed_sampler=True)
    run.fit(Net(32), loader(), loader(seed=1))
    Path(root, f"codes-{run.global_rank}.json").write_text(json.dumps(found))


leave_group_at_exit()

if __name__ == "__main__":
    main()
