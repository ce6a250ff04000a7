"""Peak resident memory of two processes that share a model, and quantize it after a fit, printed for each.

python sharded_memory.py ROOT [LAYERS WIDTH] [best|current]
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from lightnings import Callback, LightningModule, ModelCheckpoint, ModelParallelStrategy
from models import trainer
from ranks import leave_group_at_exit
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from tinyq_lightning import TinyQCallback


class Wide(LightningModule):
    """Layers that are made without memory: a process never holds more than its shard of them."""

    def __init__(self, layers: int = 12, width: int = 4096):
        super().__init__()
        self.save_hyperparameters()
        self.layers = None

    def configure_model(self):
        with torch.device("meta"):
            layers = [nn.Linear(self.hparams.width, self.hparams.width, bias=False) for _ in range(self.hparams.layers)]
        self.layers = nn.ModuleList(layers)
        mesh = self.device_mesh["data_parallel"]
        for layer in self.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh)

    def training_step(self, batch, batch_idx):
        for layer in self.layers:
            batch = layer(batch).relu()
        return batch.sum()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-6, foreach=False)

    def train_dataloader(self):
        return DataLoader(torch.ones(4, self.hparams.width), batch_size=2)

    val_dataloader = train_dataloader


class FromHere(Callback):
    """Stands before the TinyQCallback: what comes after it is of quantizing."""

    def on_fit_end(self, trainer, pl_module):
        trainer.strategy.barrier()
        self.before = megabytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.began = time.perf_counter()


def megabytes(name: str) -> int:
    return next(
        int(line.split()[1]) // 1000
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(name)
    )


def main() -> None:
    root, layers, width = Path(sys.argv[1]), *map(int, sys.argv[2:4] or (12, 4096))
    weights = sys.argv[4] if len(sys.argv) > 4 else "best"
    torch.set_num_threads(1)
    mark, callback = FromHere(), TinyQCallback("w8a32", weights=weights, report=False, strict=True)
    keeper = ModelCheckpoint(dirpath=root, save_weights_only=True)
    run = trainer(root, keeper, mark, callback, strategy=ModelParallelStrategy(2, 1), devices=2, max_epochs=1)
    run.fit(Wide(layers, width))
    found = {
        "rank": run.global_rank,
        "shard_mb": layers * width * width * 4 // 2 // 10**6,
        "layer_mb": width * width * 4 // 10**6,
        "codes_mb": layers * width * width // 10**6,
        "before_mb": mark.before,
        "peak_mb": megabytes("VmHWM"),
        "seconds": round(time.perf_counter() - mark.began, 1),
        "file_mb": os.path.getsize(callback.quantized_path) // 10**6,
    }
    (root / f"memory-{run.global_rank}.json").write_text(json.dumps(found))
    print(" ".join(f"{key} {value}" for key, value in found.items()), flush=True)


leave_group_at_exit()

if __name__ == "__main__":
    main()
