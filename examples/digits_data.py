"""scikit-learn's handwritten digits (1,797 images of 8×8) as a data module, and a network for them."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score


class Digits(LightningDataModule):
    """60 % for training, 20 % for validation, 20 % for the test; the same split every time."""

    def __init__(self, batch_size: int = 64):
        super().__init__()
        self.batch_size = batch_size
        images, labels = load_digits(return_X_y=True)
        images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
        rest, test = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=labels)
        train, val = train_test_split(rest, test_size=0.25, random_state=0, stratify=labels[rest])
        self.parts = {
            name: TensorDataset(images[part], labels[part])
            for name, part in (("train", train), ("val", val), ("test", test))
        }

    def train_dataloader(self):
        return DataLoader(self.parts["train"], self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.parts["val"], self.batch_size)

    def test_dataloader(self):
        return DataLoader(self.parts["test"], self.batch_size)


class DigitsNet(LightningModule):
    """Six Linear layers with residual blocks; logs accuracy and F1 with torchmetrics."""

    def __init__(self, width: int = 256, lr: float = 1e-3):
        super().__init__()
        self.save_hyperparameters()
        self.stem = nn.Linear(64, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(2)
        )
        self.head = nn.Linear(width, 10)
        metrics = MetricCollection({"acc": MulticlassAccuracy(10, average="micro"), "f1": MulticlassF1Score(10)})
        self.val_metrics, self.test_metrics = metrics.clone(prefix="val_"), metrics.clone(prefix="test_")

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.val_metrics(self(batch[0]), batch[1])
        self.log_dict(self.val_metrics)

    def test_step(self, batch, batch_idx):
        self.test_metrics(self(batch[0]), batch[1])
        self.log_dict(self.test_metrics)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
