"""An error after a run: told in full, without taking the results of the run along."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from lightning_utilities.core.rank_zero import rank_zero_warn

from tinyq_lightning.errors import TinyQError
from tinyq_lightning.trainer.ranks import NotHeardError, agreed_on_failure, as_tinyq_error

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "Failing",
    "step_after_run",
    "tell_of_interrupt",
    "tell_of_quantized_layers",
]

_HOW_TO_QUANTIZE_LATER = (
    "TinyQCallback(..., when='test_start') with Trainer.test(model, ckpt_path=...) quantizes a float checkpoint."
)


class Failing(Protocol):
    """What takes an error: whether to raise it, the first one, and the float checkpoint that the user still has."""

    strict: bool
    error: TinyQError | None
    float_path: str | None


@contextmanager
def step_after_run(owner: Failing, trainer: Trainer, name: str) -> Iterator[None]:
    """Run a step after training or testing: if it fails on any rank, each rank sets ``error``, and rank 0 warns.

    Steps may be nested.

    Args:
        owner: its ``error`` is set unless it holds an earlier one.
        trainer: the user's.
        name: what fails, such as ``Quantizing``.

    Raises:
        TinyQError: the step failed and the owner is ``strict``.
        NotHeardError: it failed on this rank, and others cannot be kept from waiting for it.
    """
    began = False
    try:
        with agreed_on_failure(trainer):
            began = True
            yield
    except NotHeardError:  # the other ranks would wait for this one in vain
        raise
    except Exception as reason:
        if not began:  # another rank failed before this step, which a step around this one tells
            raise
        if owner.error is not None and str(reason) == str(owner.error):  # of a step inside this one
            raise owner.error from owner.error.__cause__
        stage = "fit" if trainer.state.fn == "fit" else "test"
        error = _failure(name, reason, stage, owner.float_path)
        error.__cause__ = reason
        owner.error = owner.error or error
        if owner.strict:
            raise error from reason
        _without_frames(error)
        try:
            rank_zero_warn(f"TinyQ: {error}")
        except Warning:  # the user has turned warnings into errors, but this one must not end the run
            print(f"TinyQ: {error}", file=sys.stderr)


def tell_of_interrupt(trainer: Trainer, saved: Iterable[str]) -> None:
    """Say which quantized checkpoints an interrupted fit has saved, or how to quantize what there is."""
    if paths := ", ".join(saved):
        trainer.print(f"TinyQ: interrupted after the quantized checkpoints were saved: {paths}")
    else:
        trainer.print(f"TinyQ: the fit was interrupted, so nothing was quantized. {_HOW_TO_QUANTIZE_LATER}")


def tell_of_quantized_layers(error: BaseException, later: Sequence[object]) -> None:
    """Add to an error of another callback, as the test starts, that the module holds quantized layers, as a note.

    Python 3.10 has no notes.

    Args:
        error: that ended a test run.
        later: the callbacks after the one that put the layers in. Errors of anything else have other reasons.
    """
    hooks = ("on_test_start", "on_test_epoch_start")
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name in hooks]
    of_later = any(frame.f_locals.get("self") is each for frame in frames for each in later)
    if of_later and isinstance(error, Exception) and not isinstance(error, TinyQError) and hasattr(error, "add_note"):
        error.add_note(
            "TinyQ: from TinyQCallback's on_test_start to the end of the test epoch the module holds quantized layers, "
            "whose weights are no parameters. A callback that puts other weights in for the test, such as an average, "
            "comes before TinyQCallback in callbacks=[...]: then those weights are quantized and tested"
        )


def _failure(step: str, error: Exception, stage: str, float_path: str | None) -> TinyQError:
    """The error as a TinyQError that also says what the user still has.

    Args:
        step: what failed, such as ``Quantizing``.
        error: why.
        stage: ``fit`` or ``test``.
        float_path: the float checkpoint, or None.
    """
    kind, reason = as_tinyq_error(error)
    if stage == "test":
        safe = "The test had finished and its results are safe."
    elif float_path is not None:
        safe = (
            "The training had finished and its results are safe; the float checkpoint is "
            f"{float_path}. {_HOW_TO_QUANTIZE_LATER}"
        )
    else:
        safe = (
            "The training had finished. The trained weights are in the module, and trainer.save_checkpoint(...) saves "
            f"them. {_HOW_TO_QUANTIZE_LATER}"
        )
    return kind(f"{step} failed: {reason}\n{safe}")


def _without_frames(error: BaseException) -> None:
    """Replace the tracebacks of an error by a note with their text.

    The frames of a traceback hold the Trainer, the model and copies of its weights as long as the error lives.
    """
    told = "".join(traceback.format_exception(error))
    chain: list[BaseException] = [error]
    for each in chain:
        each.__traceback__ = None
        chain += [other for other in (each.__cause__, each.__context__) if other is not None and other not in chain]
    vars(error)["__notes__"] = [told]  # as add_note does, which Python 3.10 is without
