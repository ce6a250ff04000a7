"""Lightning's classes for the tests, from the package that ``TINYQ_TEST_NAMESPACE`` names.

The same tests run with ``lightning.pytorch`` and with ``TINYQ_TEST_NAMESPACE=pytorch_lightning``.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from typing import Any

import pytest

NAMESPACE = os.environ.get("TINYQ_TEST_NAMESPACE", "lightning.pytorch")
OTHER = "pytorch_lightning" if NAMESPACE == "lightning.pytorch" else "lightning.pytorch"

_PLACES = {
    "callbacks": (
        "EMAWeightAveraging",
        "LambdaCallback",
        "ModelCheckpoint",
        "ModelSummary",
        "RichProgressBar",
        "StochasticWeightAveraging",
        "TQDMProgressBar",
        "WeightAveraging",
    ),
    "cli": ("LightningCLI",),
    "loggers": ("CSVLogger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger"),
    "strategies": ("FSDPStrategy", "ModelParallelStrategy", "SingleDeviceStrategy"),
    "utilities": ("CombinedLoader",),
    "utilities.model_summary": ("summarize",),
    "utilities.parsing": ("AttributeDict",),
}

_NEW = ("EMAWeightAveraging", "WeightAveraging")  # since Lightning 2.6


def __getattr__(name: str) -> Any:
    if name.startswith("__") and name != "__version__":
        raise AttributeError(name)
    place = next((f"{NAMESPACE}.{place}" for place, names in _PLACES.items() if name in names), NAMESPACE)
    module = importlib.import_module(place)
    found = getattr(module, name, None) or _missing(name) if name in _NEW else getattr(module, name)
    return _of_today(found) if name in ("Trainer", "seed_everything") else found


def _missing(name: str) -> Any:
    """What stands for a class that this Lightning is without: the test that makes one is skipped."""

    def skip(*args: Any, **kwargs: Any) -> None:
        pytest.skip(f"this Lightning has no {name}")

    return type(name, (), {"__init__": skip})


def _without(function: Any, argument: str) -> Any:
    """The function, except that it drops an argument that an older Lightning does not take."""
    if argument in inspect.signature(function).parameters:
        return function

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop(argument, None)
        return function(*args, **kwargs)

    return called


@functools.cache
def _of_today(found: Any) -> Any:
    """The class or function with the arguments of today's Lightning, which older ones are without."""
    if not isinstance(found, type):
        return _without(found, "verbose")
    loops = ("fit", "validate", "test", "predict")
    older = {name: _without(getattr(found, name), "weights_only") for name in loops}
    return found if all(older[name] is getattr(found, name) for name in loops) else type("Trainer", (found,), older)
