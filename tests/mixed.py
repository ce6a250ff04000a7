"""A module with layers of every kind, and a table that no layer has."""

from __future__ import annotations

import torch
from models import FEATURES, Net
from torch import nn

RULE = {"match": "table", "method": "w8a8"}
"""Names the table, which is quantized only then."""


class Mixed(Net):
    """A convolution and recurrent layers over the features as a series; look-ups of whether each is positive."""

    def __init__(self, width: int = 16, lr: float = 0.02):
        super().__init__(width, lr)
        self.conv, self.up = nn.Conv1d(1, 8, 3, padding=1), nn.ConvTranspose1d(8, 8, 2, stride=2)
        self.lstm = nn.LSTM(8, FEATURES // 2, 2, batch_first=True, bidirectional=True)
        self.words, self.bag = nn.Embedding(2 * FEATURES, FEATURES), nn.EmbeddingBag(2 * FEATURES, FEATURES)
        self.attention = nn.MultiheadAttention(FEATURES, 2, batch_first=True)
        self.table = nn.Parameter(torch.randn(FEATURES, FEATURES) / FEATURES)
        self.out = nn.Linear(FEATURES, 2 * FEATURES, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x):
        series = self.up(self.conv(x[:, None]).relu()).transpose(1, 2)
        series, _ = self.lstm(series)
        words = (x > 0).long() + 2 * torch.arange(FEATURES, device=x.device)
        found, _ = self.attention(*[self.words(words)] * 3, need_weights=False)
        found = found.mean(1) + self.bag(words) + x @ self.table
        return super().forward(x + series[:, -1] + found + self.out(found)[:, :FEATURES])
