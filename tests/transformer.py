"""A small language model with a tied head and two kinds of attention, its data, and a low-rank adapter."""

from __future__ import annotations

import torch
from lightnings import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tinyq_lightning import QuantizedCheckpointMixin

WORDS, SIZE, LENGTH = 20, 16, 5


class Language(LightningModule):
    """A tied head, an encoder, cross-attention with sizes of its own."""

    def __init__(self, size: int = SIZE, tied: bool = True):
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Embedding(WORDS, size)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(size, 2, 32, batch_first=True), 1)
        self.look = nn.MultiheadAttention(size, 2, kdim=3, vdim=3, batch_first=True)
        self.head = nn.Linear(size, WORDS)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, words):
        hidden = self.encoder(self.embed(words))
        memory = nn.functional.one_hot(words % 3, 3).to(hidden.dtype)
        return self.head(hidden + self.look(hidden, memory, memory)[0])

    def loss(self, batch):
        return nn.functional.cross_entropy(self(batch[0]).flatten(0, 1), batch[0].roll(1, 1).flatten())

    def training_step(self, batch, index):
        return self.loss(batch)

    def validation_step(self, batch, index):
        self.log("val_acc", -self.loss(batch))

    def test_step(self, batch, index):
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class MixedLanguage(QuantizedCheckpointMixin, Language):
    pass


def words(count=8):
    return torch.randint(WORDS, (count, LENGTH))


def loader():
    return DataLoader(TensorDataset(words(32)), batch_size=16)


class Adapted(nn.Module):
    """A low-rank adapter beside a frozen layer (LoRA)."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))
