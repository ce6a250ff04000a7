"""Run by test_ddp.py in processes of its own: fit and test on two gloo processes, results written by each rank.

python ddp_run.py ROOT STRATEGY
"""

import json
import sys
from pathlib import Path

import torch
from lightnings import CSVLogger, seed_everything
from models import Net, keeper, loader, trainer
from ranks import leave_group_at_exit

from tinyq_lightning import TinyQCallback


class UnsyncedNet(Net):
    """Logs one value without sync_dist, which differs from rank to rank."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)
        self.log("val_rank_loss", (self(batch[0]) ** 2).mean())


class WriteOutcome(TinyQCallback):
    """Each rank's own view of the outcome, written in its process."""

    def on_fit_end(self, trainer, pl_module):
        super().on_fit_end(trainer, pl_module)
        self.write(trainer, "fit", pl_module)

    def on_test_end(self, trainer, pl_module):
        super().on_test_end(trainer, pl_module)
        self.write(trainer, "test", pl_module)

    def write(self, trainer, stage, module):
        outcome = {
            "results": self.results,
            "path": self.quantized_path,
            "metrics": {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("tinyq/")},
            "weights": float(sum(p.double().sum() for p in module.parameters())),
        }
        Path(trainer.default_root_dir, f"{stage}-{trainer.global_rank}.json").write_text(json.dumps(outcome))


def main() -> None:
    root, strategy = sys.argv[1:]
    seed_everything(1, verbose=False)
    torch.set_num_threads(1)
    settings = {"strategy": strategy, "devices": 2, "use_distributed_sampler": True}
    module = UnsyncedNet()
    callback = WriteOutcome("w8a32", export="pt2")
    fit = trainer(root, keeper(root), callback, logger=CSVLogger(root), **settings)
    fit.fit(module, loader(shuffle=True), loader(seed=1))
    if fit.global_rank == 0:  # in the process that called fit
        outcome = {
            "results": callback.results,
            "path": callback.quantized_path,
            "float_path": callback.float_path,
            "plan": callback.plan.to_list(),
            "plans": list(callback.plans),
            "error": callback.error,
        }
        Path(root, "main.json").write_text(json.dumps(outcome))
    print("callback_metrics", sorted(name for name in fit.callback_metrics if name.startswith("tinyq/")))
    if strategy == "ddp":
        again = trainer(root, WriteOutcome("w8a8", when="test_start"), **settings)
        again.test(module, loader(seed=2), ckpt_path=fit.checkpoint_callback.best_model_path, verbose=False)


leave_group_at_exit()

if __name__ == "__main__":
    main()
