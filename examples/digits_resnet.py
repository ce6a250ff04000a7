"""A small ResNet on the digits, enlarged to 24×24: int8 convolutions when the training ends, compared on the test set.

python examples/digits_resnet.py [--epochs 6] [--methods w8a32 w8a8] [--root runs/digits_resnet]
"""

import argparse

import torch
from digits_data import Digits
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from tinyq_lightning import TinyQCallback, load_quantized


class Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.path = nn.Sequential(
            *(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()),
            *(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)),
        )
        self.skip = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x):
        return (self.path(x) + self.skip(x)).relu()


class DigitsResNet(LightningModule):
    def __init__(self):
        super().__init__()
        blocks = (Block(channels, out, stride) for channels, out, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)))
        self.net = nn.Sequential(
            *(nn.Unflatten(1, (1, 8, 8)), nn.Upsample(scale_factor=3, mode="bilinear")),
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), *blocks),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
        )
        self.val_acc, self.test_acc = (MulticlassAccuracy(10, average="micro") for _ in range(2))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.val_acc(self(batch[0]), batch[1])
        self.log("val_acc", self.val_acc)

    def test_step(self, batch, batch_idx):
        self.test_acc(self(batch[0]), batch[1])
        self.log("test_acc", self.test_acc)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--methods", nargs="+", default=["w8a32", "w8a8"])
    parser.add_argument("--root", default="runs/digits_resnet", help="folder for checkpoints and logs")
    args = parser.parse_args()

    seed_everything(0)
    data, tinyq = Digits(), TinyQCallback(args.methods)
    callbacks = [ModelCheckpoint(monitor="val_acc", mode="max"), tinyq]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu", max_epochs=args.epochs, callbacks=callbacks, default_root_dir=args.root, **quiet
    )
    trainer.fit(DigitsResNet(), data)

    trained = DigitsResNet.load_from_checkpoint(tinyq.float_path, weights_only=True)
    models = {"float": trained, tinyq.plan.label: load_quantized(tinyq.quantized_path, DigitsResNet)}
    for name, model in models.items():
        print(f"{name:8}test_acc {trainer.test(model, data, verbose=False)[0]['test_acc']:.4f}")


if __name__ == "__main__":
    main()
