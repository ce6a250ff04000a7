"""The command line."""

from tinyq_lightning.command.cli import main

__all__ = [
    "main",
]
