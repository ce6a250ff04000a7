"""Train an LSTM to forecast a day of hourly demand from the week before, and quantize it when the training ends.

The series is made: a daily and a weekly rhythm, a slow drift, heat waves that linger, and noise.

python examples/forecasting.py [--epochs 6] [--root runs/forecasting]
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tinyq_lightning import TinyQCallback, load_quantized

PAST, FUTURE = 7 * 24, 24


def demand(hours: int = 400 * 24) -> Tensor:
    """``[hours]``: hourly demand, of mean 0 and about 1 in size."""
    generator, time = torch.Generator().manual_seed(0), torch.arange(hours)
    day, week = (2 * torch.pi * time / period for period in (24, 168))
    heat = torch.zeros(hours)
    for hour, push in enumerate(0.1 * torch.randn(hours, generator=generator)):
        heat[hour] = 0.98 * heat[hour - 1] + push
    rhythm = day.sin() * (1 + 0.4 * week.cos()) + 0.4 * (2 * day).cos() + 0.5 * week.sin()
    return rhythm + heat.clamp_min(0) * day.sin() + 0.1 * torch.randn(hours, generator=generator)


def windows(series: Tensor, first: int, last: int) -> TensorDataset:
    """Every sixth hour between two: the week before it, and the day after."""
    parts = [series[at - PAST : at + FUTURE] for at in range(first + PAST, last - FUTURE, 6)]
    return TensorDataset(*torch.stack(parts).split([PAST, FUTURE], dim=1))


class Forecaster(LightningModule):
    def __init__(self, width: int = 96):
        super().__init__()
        self.save_hyperparameters()
        self.lstm = nn.LSTM(24, width, num_layers=2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(width, FUTURE)

    def forward(self, past: Tensor) -> Tensor:
        days = past.unflatten(1, (-1, 24))  # a step is a day
        return days[:, -1] + self.head(self.lstm(days)[0][:, -1])

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.l1_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val_mae", nn.functional.l1_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--root", default="runs/forecasting", help="folder for checkpoints")
    args = parser.parse_args()

    seed_everything(0)
    series = demand()
    train, val = (windows(series, *hours) for hours in ((0, 320 * 24), (320 * 24, len(series))))
    tinyq, keeper = TinyQCallback("w8a32"), ModelCheckpoint(args.root, monitor="val_mae")
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=args.epochs, callbacks=[keeper, tinyq], **settings)
    trainer.fit(Forecaster(), DataLoader(train, 64, shuffle=True), DataLoader(val, 64))

    net = load_quantized(tinyq.quantized_path, Forecaster)
    again = trainer.validate(net, DataLoader(val, 64), verbose=False)[0]["val_mae"]
    yesterday = nn.functional.l1_loss(val.tensors[0][:, -24:], val.tensors[1])
    print(f"\nval_mae of the reloaded int8 file {again:.6f}; of the day before as the forecast {yesterday:.6f}")


if __name__ == "__main__":
    main()
