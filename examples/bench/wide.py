"""A model of many Linear layers, and a float checkpoint of it, for the memory of files."""

from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import nn


class Wide(LightningModule):
    def __init__(self, width: int, depth: int):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


def write(path: Path, width: int, depth: int) -> None:
    content = {
        "state_dict": Wide(width, depth).state_dict(),
        "hyper_parameters": {"width": width, "depth": depth},
        "pytorch-lightning_version": "2.6.6",
        "epoch": 0,
        "global_step": 0,
    }
    torch.save(content, path)
