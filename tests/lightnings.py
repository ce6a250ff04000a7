"""Lightning's classes for the tests, from the package that ``TINYQ_TEST_NAMESPACE`` names.

The same tests run with ``lightning.pytorch`` and with ``TINYQ_TEST_NAMESPACE=pytorch_lightning``.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

NAMESPACE = os.environ.get("TINYQ_TEST_NAMESPACE", "lightning.pytorch")
OTHER = "pytorch_lightning" if NAMESPACE == "lightning.pytorch" else "lightning.pytorch"

_PLACES = {
    "callbacks": (
        "EMAWeightAveraging",
        "ModelCheckpoint",
        "ModelSummary",
        "StochasticWeightAveraging",
        "WeightAveraging",
    ),
    "cli": ("LightningCLI",),
    "loggers": ("CSVLogger", "MLFlowLogger", "TensorBoardLogger"),
    "strategies": ("ModelParallelStrategy",),
    "utilities": ("CombinedLoader",),
    "utilities.model_summary": ("summarize",),
    "utilities.parsing": ("AttributeDict",),
}


def __getattr__(name: str) -> Any:
    if name.startswith("__") and name != "__version__":
        raise AttributeError(name)
    place = next((f"{NAMESPACE}.{place}" for place, names in _PLACES.items() if name in names), NAMESPACE)
    return getattr(importlib.import_module(place), name)
