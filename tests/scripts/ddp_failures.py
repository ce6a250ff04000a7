"""Run by test_ddp.py in processes of its own: fits after which one rank fails, each rank's error written by it.

python ddp_failures.py ROOT
"""

import json
import sys
from pathlib import Path

import torch
from lightnings import CSVLogger, seed_everything
from models import Net, keeper, loader, trainer
from ranks import leave_group_at_exit

from tinyq_lightning import TinyQCallback
from tinyq_lightning.layers import QuantizedLinear


class Fails(Net):
    """Fails on one rank, in a place that a collective of the other rank follows."""

    def __init__(self, place, rank):
        super().__init__()
        self.place, self.rank, self.states = place, rank, 0

    def fail_at(self, place):
        if self.place == place and self.global_rank == self.rank:
            raise KeyError(f"{place} on rank {self.rank}")

    def on_load_checkpoint(self, checkpoint):
        self.fail_at("load")

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        if isinstance(self.head, QuantizedLinear):
            self.fail_at("loop")
        super().validation_step(batch, batch_idx)
        self.log("val_mean", self(batch[0]).mean(), on_step=True, sync_dist=True)

    def state_dict(self, *args, **kwargs):
        if isinstance(self.head, QuantizedLinear):
            self.states += 1
            if self.states == 2:  # the first is asked for its size only
                self.fail_at("save")
        return super().state_dict(*args, **kwargs)


class FailingLogger(CSVLogger):
    """Fails once the comparison is logged, which rank 0 does alone."""

    def log_metrics(self, metrics, step=None):
        if any(name.startswith("tinyq/") for name in metrics):
            raise ConnectionError("log on rank 0")
        super().log_metrics(metrics, step)


def main() -> None:
    root = Path(sys.argv[1])
    seed_everything(1, verbose=False)
    torch.set_num_threads(1)
    for place, rank in (("load", 1), ("loop", 1), ("loop", 0), ("save", 1), ("log", 0), ("nowhere", 0)):
        folder = root / f"{place}{rank}"
        logger = FailingLogger(folder) if place == "log" else CSVLogger(folder)
        callback = TinyQCallback("w8a32", report=False)
        run = trainer(folder, keeper(folder), callback, logger=logger, strategy="ddp", devices=2)
        module = Fails(place, rank)
        run.fit(module, loader(shuffle=True), loader(seed=1))
        outcome = {
            "error": callback.error and str(callback.error),
            "kind": type(callback.error).__name__,
            "float_path": callback.float_path,
            "path": callback.quantized_path,
            "results": callback.results,
            "validated": run.validate(module, loader(seed=1), verbose=False)[0]["val_mean_epoch"],
        }
        (root / f"{place}{rank}-{run.global_rank}.json").write_text(json.dumps(outcome))


leave_group_at_exit()

if __name__ == "__main__":
    main()
