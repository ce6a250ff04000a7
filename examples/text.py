"""Train a small transformer to write text letter by letter, and compare three methods when the training ends.

The text is what scikit-learn says of its own data sets; the head shares its weight with the embedding.

python examples/text.py [--epochs 4] [--root runs/text]
"""

import argparse
import math

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn import datasets
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tinyq_lightning import TinyQCallback, load_quantized

LETTERS, LENGTH = 128, 96  # ASCII; letters of a sample


class Writer(LightningModule):
    def __init__(self, width: int = 64, depth: int = 2):
        super().__init__()
        self.save_hyperparameters()
        self.embed, self.place = nn.Embedding(LETTERS, width), nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, LETTERS, bias=False)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        self.head.weight = self.embed.weight

    def forward(self, letters: Tensor) -> Tensor:
        length = letters.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, letters.device)
        hidden = self.embed(letters) + self.place.weight[:length]
        return self.head(self.encoder(hidden, mask, is_causal=True))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("val_bits_per_letter", self.training_step(batch, index) / math.log(2), batch_size=len(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=4e-3)


def samples(step: int) -> tuple[Dataset, Dataset]:
    """Pieces of ``LENGTH + 1`` letters, every ``step`` of them, to train on; of the last tenth, to validate on."""
    names = ("breast_cancer", "iris", "diabetes", "digits", "wine", "linnerud")
    text = "".join(getattr(datasets, f"load_{name}")().DESCR for name in names)
    letters = torch.tensor([ord(letter) % LETTERS for letter in text])
    train, val = letters.split([len(letters) * 9 // 10, len(letters) - len(letters) * 9 // 10])
    return train.unfold(0, LENGTH + 1, step), val.unfold(0, LENGTH + 1, LENGTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--root", default="runs/text", help="folder for checkpoints")
    args = parser.parse_args()

    seed_everything(0)
    train, val = samples(step=16)
    tinyq, keeper = TinyQCallback(["w8a32", "w8a16", "w8a8"]), ModelCheckpoint(args.root, monitor="val_bits_per_letter")
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=args.epochs, callbacks=[keeper, tinyq], **settings)
    trainer.fit(Writer(), DataLoader(train, 16, shuffle=True), DataLoader(val, 32))
    net = load_quantized(tinyq.quantized_paths["w8a8"], Writer)
    print(f"\nval_bits_per_letter reloaded {trainer.validate(net, DataLoader(val, 32), verbose=False)[0]}")


if __name__ == "__main__":
    main()
