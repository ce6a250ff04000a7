"""A LightningModule of many Linear layers, for the memory that files take."""

from lightning.pytorch import LightningModule
from torch import nn


class Wide(LightningModule):
    def __init__(self, width: int, depth: int):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
