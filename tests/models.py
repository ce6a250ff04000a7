"""A small classification task, and modules that log in the many ways users do."""

from __future__ import annotations

from collections import Counter

import torch
from lightnings import LightningDataModule, LightningModule, ModelCheckpoint, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

FEATURES, CLASSES = 8, 4

loops_of: Counter[str] = Counter()
"""Validation loops by the name of the class; neither modules nor classes can keep what an evaluation puts back."""


def samples(count: int = 192, seed: int = 0) -> TensorDataset:
    """Points about four centres that overlap, so that no model is perfect."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return TensorDataset(centres[labels] + torch.randn(count, FEATURES, generator=generator), labels)


def has_trained(run: Trainer) -> bool:
    """Whether the epochs of a fit are over, so that a validation loop is the comparison's."""
    return run.fit_loop.epoch_progress.current.completed == run.max_epochs


def loader(count: int = 192, seed: int = 0, **kwargs) -> DataLoader:
    return DataLoader(samples(count, seed), **{"batch_size": 32, **kwargs})


class Data(LightningDataModule):
    """Other data for each loop."""

    def __init__(self, **kwargs):
        super().__init__()
        self.kwargs = kwargs

    def train_dataloader(self):
        return loader(shuffle=True, **self.kwargs)

    def val_dataloader(self):
        return loader(seed=1, **self.kwargs)

    def test_dataloader(self):
        return loader(seed=2, **self.kwargs)


class Blobs(Data):
    """A data module whose transfer hook matters: without it the model sees other numbers."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.setups = 0

    def setup(self, stage):
        self.setups += 1

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] * 0.5, batch[1]]


class Net(LightningModule):
    """Logs a torchmetrics object, a collection and a plain value."""

    def __init__(self, width: int = 16, lr: float = 0.02):
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, CLASSES)
        self.val_acc = MulticlassAccuracy(CLASSES, average="micro")
        self.test_acc = MulticlassAccuracy(CLASSES, average="micro")
        collection = MetricCollection({"f1": MulticlassF1Score(CLASSES), "recall": MulticlassAccuracy(CLASSES)})
        self.val_more, self.test_more = collection.clone(prefix="val_"), collection.clone(prefix="test_")

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def evaluate(self, batch, stage):
        logits = self(batch[0])
        accuracy, more = (self.val_acc, self.val_more) if stage == "val" else (self.test_acc, self.test_more)
        accuracy(logits, batch[1])
        more(logits, batch[1])
        self.log(f"{stage}_acc", accuracy)
        self.log_dict(more)
        self.log(f"{stage}_loss", nn.functional.cross_entropy(logits, batch[1]))
        return logits

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return self.evaluate(batch, "val")

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        return self.evaluate(batch, "test")

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


class TiedEncoder(Net):
    """Attention in torch's fused encoder, and a Linear tied to an embedding."""

    depth = 1

    def __init__(self, width: int = 16):
        super().__init__(width)
        del self.body
        self.embed = nn.Embedding(FEATURES, width)
        layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, self.depth, enable_nested_tensor=False)
        self.out = nn.Linear(width, FEATURES, bias=False)
        self.out.weight = self.embed.weight
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        return self.head(self.out(self.encoder(self.embed.weight * x[..., None]).mean(1)))


class NetOfHooks(Net):
    """Keeps predictions in a list and logs from the hooks at the end of batches and epochs."""

    def __init__(self, width: int = 16, lr: float = 0.02):
        super().__init__(width, lr)
        self.outputs = []
        self.batches = 0

    def on_validation_epoch_start(self):
        self.outputs.clear()

    def on_test_epoch_start(self):
        self.outputs.clear()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.outputs.append((self(batch[0]).argmax(1) == batch[1]).float())

    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self.batches += 1
        self.log("val_batch_acc", self.outputs[-1].mean(), batch_size=len(batch[1]))

    def on_validation_epoch_end(self):
        self.log("val_acc", torch.cat(self.outputs).mean())

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.outputs.append((self(batch[0]).argmax(1) == batch[1]).float())

    def on_test_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self.batches += 1
        self.log("test_batch_acc", self.outputs[-1].mean(), batch_size=len(batch[1]))

    def on_test_epoch_end(self):
        self.log("test_acc", torch.cat(self.outputs).mean())


def trainer(root, *callbacks, **kwargs) -> Trainer:
    """A quiet Trainer on one CPU process that keeps its files below ``root``."""
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(root),
    }
    return Trainer(callbacks=list(callbacks), **{**settings, **kwargs})


def keeper(root, **kwargs) -> ModelCheckpoint:
    """A ModelCheckpoint that keeps the best by accuracy."""
    return ModelCheckpoint(dirpath=str(root), **{"monitor": "val_acc", "mode": "max", **kwargs})
