"""A model that ModelParallelStrategy shards in any of its ways, and trains whole where there is no mesh."""

from __future__ import annotations

import torch
from lightnings import LightningDataModule, LightningModule
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset


class ShardedNet(LightningModule):
    """Two layers to split, one that no way splits evenly, buffers that are saved or not, and a hook of the user's."""

    def __init__(self, width: int = 16, how: str = "fsdp"):
        super().__init__()
        self.save_hyperparameters()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)
        self.norm = nn.LayerNorm(8)
        self.odd = nn.Linear(8, 5)
        self.head = nn.Linear(5, 4)
        self.register_buffer("shift", torch.full((1,), 0.5))
        self.register_buffer("scale", torch.ones(1), persistent=False)
        self.head.register_forward_pre_hook(no_change)

    def configure_model(self):
        data, tensor = self.device_mesh["data_parallel"], self.device_mesh["tensor_parallel"]
        if self.hparams.how in ("tensor", "both"):
            parallelize_module(self, tensor, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if self.hparams.how == "fsdp":
            self.up, self.down = torch.compile(self.up, backend="eager"), checkpoint_wrapper(self.down)
        if self.hparams.how in ("fsdp", "both"):
            for layer in (self.up, self.down, self.odd):
                fully_shard(layer, mesh=data)
            fully_shard(self, mesh=data)

    def forward(self, x):
        return self.head(self.odd(self.norm(self.down(self.up(x).relu())) * self.scale + self.shift))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01, foreach=False)


def no_change(module, args):
    """A hook that stays with the layer."""


class Points(LightningDataModule):
    """Random points of four classes."""

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        points = torch.randn(64, 8, generator=generator)
        return DataLoader(TensorDataset(points, torch.randint(4, (64,), generator=generator)), batch_size=8)

    val_dataloader = test_dataloader = train_dataloader
