"""Run by test_ddp_budget.py: a search on two gloo processes, by a metric that differs from rank to rank.

python ddp_budget.py ROOT
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from lightnings import seed_everything
from models import Net, loader, trainer
from ranks import leave_group_at_exit

from tinyq_lightning import TinyQCallback


class UnsyncedNet(Net):
    """Logs one value without sync_dist."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)
        self.log("val_rank_loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))


class WritePlan(TinyQCallback):
    """Each rank's own view of the search."""

    def on_fit_end(self, trainer, pl_module):
        super().on_fit_end(trainer, pl_module)
        seen = {"plan": self.plan.to_list(), "trials": [asdict(trial) for trial in self.search.trials]}
        Path(trainer.default_root_dir, f"{self.monitor}-{trainer.global_rank}.json").write_text(json.dumps(seen))


def main() -> None:
    root = sys.argv[1]
    seed_everything(1, verbose=False)
    torch.set_num_threads(1)
    module = UnsyncedNet()
    settings = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": True}
    trainer(root, limit_val_batches=0, **settings).fit(module, loader(shuffle=True), loader(seed=1))
    with torch.no_grad():  # rows hidden under a huge weight of a feature that the loss hardly needs
        module.head.weight[:, 0] += 40
    for monitor, mode in (("val_rank_loss", "min"), ("val_acc", None)):
        spec = {"method": "w8a8", "weights": "current"}
        callback = WritePlan(spec, monitor=monitor, mode=mode, max_drop=1e-4, report=False)
        trainer(root, callback, max_epochs=0, **settings).fit(module, loader(), loader(seed=1))


leave_group_at_exit()

if __name__ == "__main__":
    main()
