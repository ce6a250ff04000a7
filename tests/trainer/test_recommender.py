"""A trained recommender, nearly all of whose weights are tables: a quarter of the size, as good as in float."""

from __future__ import annotations

import pytest
import torch
from lightnings import LightningModule
from models import keeper, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import BinaryAccuracy

from tinyq_lightning import TinyQCallback, load_quantized

USERS, ITEMS, SEEN, WIDTH = 300, 500, 12, 64


def ratings(count, seed):
    """Whether a user likes an item, by hidden tastes; and what the user has seen, which tells of them."""
    hidden = torch.Generator().manual_seed(7)
    tastes, traits = torch.randn(USERS, 4, generator=hidden), torch.randn(ITEMS, 4, generator=hidden)
    seen = (tastes @ traits.T).topk(4 * SEEN).indices
    generator = torch.Generator().manual_seed(seed)
    user, item = (torch.randint(size, (count,), generator=generator) for size in (USERS, ITEMS))
    history = seen[user][:, torch.randperm(4 * SEEN, generator=generator)[:SEEN]]
    liked = (tastes[user] * traits[item]).sum(1) > 0
    return DataLoader(TensorDataset(user, item, history, liked), batch_size=256)


class Recommender(LightningModule):
    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(USERS, WIDTH), nn.Embedding(ITEMS, WIDTH)
        self.history = nn.EmbeddingBag(ITEMS, WIDTH, mode="mean", padding_idx=0)
        self.mix = nn.Linear(2 * WIDTH, WIDTH)
        for table in (self.users, self.items, self.history):
            nn.init.normal_(table.weight, std=0.1)
        self.accuracy = BinaryAccuracy()

    def forward(self, user, item, history):
        wanted = self.mix(torch.cat([self.users(user), self.history(history)], 1))
        return (wanted * self.items(item)).sum(1)

    def training_step(self, batch, batch_idx):
        *inputs, liked = batch
        return nn.functional.binary_cross_entropy_with_logits(self(*inputs), liked.float())

    def validation_step(self, batch, batch_idx):
        *inputs, liked = batch
        self.accuracy(self(*inputs), liked)
        self.log("val_acc", self.accuracy)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.mark.parametrize("method", ["w8a32", "w8a8"])
def test_a_recommender_is_a_quarter_and_as_good(tmp_path, method):
    callback = TinyQCallback(method)
    run, module = trainer(tmp_path, keeper(tmp_path), callback, max_epochs=3), Recommender()
    run.fit(module, ratings(40_000, 1), ratings(4000, 2))
    assert callback.error is None
    values = callback.results["val_acc"]
    assert values["float"] > 0.75, "it has learned something"
    assert abs(values["delta"]) <= 0.003
    assert [each.kind for each in callback.plan] == ["embedding"] * 3 + ["linear"]
    assert sum(each.bytes for each in callback.plan) <= 0.27 * sum(each.float_bytes for each in callback.plan)
    state = load_quantized(callback.quantized_path, Recommender).state_dict()
    assert sum(value.nbytes for value in state.values()) <= 0.27 * sum(
        value.nbytes for value in module.state_dict().values()
    )
