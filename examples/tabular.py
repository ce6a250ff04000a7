"""Train a network with residual blocks on a table, and quantize it within a budget when the training ends.

The table is scikit-learn's of breast tumours: 569 rows of 30 measurements, benign or malignant.

python examples/tabular.py [--epochs 15] [--root runs/tabular]
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import BinaryAUROC

from tinyq_lightning import TinyQCallback, load_quantized


class Table(LightningModule):
    def __init__(self, columns: int = 30, width: int = 128, blocks: int = 3):
        super().__init__()
        self.save_hyperparameters()
        self.stem = nn.Linear(columns, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, 1)
        self.auroc = BinaryAUROC()

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.stem(rows)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)[:, 0]

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.auroc(self(batch[0]), batch[1].int())
        self.log("val_auroc", self.auroc)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def table() -> tuple[TensorDataset, TensorDataset]:
    """Rows to train on and to validate on, each column of mean 0 and spread 1 in the first."""
    rows, labels = (torch.tensor(part, dtype=torch.float32) for part in load_breast_cancer(return_X_y=True))
    parts = train_test_split(rows, labels, test_size=0.3, random_state=0, stratify=labels)
    train, val = ((part - parts[0].mean(0)) / parts[0].std(0) for part in parts[:2])
    return TensorDataset(train, parts[2]), TensorDataset(val, parts[3])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--root", default="runs/tabular", help="folder for checkpoints")
    args = parser.parse_args()

    seed_everything(0)
    train, val = table()
    tinyq = TinyQCallback("w8a8", monitor="val_auroc", mode="max", max_drop=0.001)
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    keeper = ModelCheckpoint(args.root, monitor="val_auroc", mode="max")
    trainer = Trainer(max_epochs=args.epochs, callbacks=[keeper, tinyq], **settings)
    trainer.fit(Table(), DataLoader(train, 32, shuffle=True), DataLoader(val, 64))
    net = load_quantized(tinyq.quantized_path, Table)
    again = trainer.validate(net, DataLoader(val, 64), verbose=False)[0]["val_auroc"]
    print(f"\nval_auroc of the reloaded int8 file {again:.6f}")


if __name__ == "__main__":
    main()
