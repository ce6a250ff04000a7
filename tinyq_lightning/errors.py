"""What can go wrong, named. Every error says what was wrong, where, and what to do about it."""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "EvaluationError",
    "ExportError",
    "MissingExtraError",
    "ModelError",
    "ReadOnlyWeightError",
    "SpecError",
    "TinyQError",
    "TrainerError",
    "quoted",
]


class TinyQError(Exception):
    """Base of every error this package raises on purpose."""


class SpecError(TinyQError, ValueError):
    """The spec (YAML, mapping or arguments) asks for something that is not there."""


class ModelError(TinyQError, ValueError):
    """The model cannot be quantized as asked: non-finite, unmaterialized or misplaced weights."""


class ReadOnlyWeightError(TinyQError, AttributeError):
    """Something tried to write the dequantized view of an int8 weight."""


class CheckpointError(TinyQError, RuntimeError):
    """A checkpoint file is missing, damaged, of another kind, or does not fit the model."""


class EvaluationError(TinyQError, RuntimeError):
    """The user's validation or test loop could not be run a second time."""


class ExportError(TinyQError, RuntimeError):
    """A model could not be written for another runtime, or what was written does not compute what the model does."""


class TrainerError(TinyQError, RuntimeError):
    """The Trainer is set up in a way that the callback does not support."""


class MissingExtraError(TinyQError, ImportError):
    """An optional dependency is needed and not installed."""


def quoted(error: BaseException) -> str:
    """An exception as an error of ours quotes it: its type and its text, if it has one and that can be made."""
    try:
        text = str(error)
    except Exception:  # of a class of others
        text = "its text cannot be made"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
