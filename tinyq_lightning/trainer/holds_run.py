"""What the callback holds: of one run, which no copy of it takes along, and what a run sets for the user."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

from tinyq_lightning.errors import TinyQError
from tinyq_lightning.plan import Plan
from tinyq_lightning.search import Search
from tinyq_lightning.trainer.launched import registered
from tinyq_lightning.trainer.quantized_start import QuantizedStart
from tinyq_lightning.trainer.results import Results
from tinyq_lightning.trainer.test_run import TestRun
from tinyq_lightning.trainer.validated import WatchesValidation

__all__ = [
    "HoldsRun",
]

# Attributes that belong to one run (Lightning sets the last two, of its module), and those a run sets for the user.
_OF_A_RUN = (
    "_quantized_start",
    "_files_before",
    "_runs",
    "_earlier",
    "_told",
    "_told_metrics",
    "validated",
    "first_batch",
    "log",
    "log_dict",
)
_OUTCOME = ("quantized_paths", "float_path", "plan", "plans", "results", "search", "error")


class HoldsRun(WatchesValidation):
    """The attributes of :class:`~tinyq_lightning.TinyQCallback`, where they are documented.

    Attributes:
        of_a_run: names of those that a run sets: they stay where the module holds a callback and is put back.
    """

    of_a_run: ClassVar[Collection[str]] = (*_OF_A_RUN, *_OUTCOME)

    def _begin(self) -> None:
        self._key = registered(self)
        self._reset_run()
        self._reset_results()

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a run: the Trainer, the module and layers made for it."""
        return {name: value for name, value in vars(self).items() if name not in _OF_A_RUN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy belongs to no run."""
        vars(self).update(state)
        self._key = registered(self, self._key)
        self._reset_run()

    def _reset_run(self) -> None:
        self._quantized_start: QuantizedStart | None = None
        self._files_before: dict[str, object] = {}
        self._runs: list[TestRun] = []
        self._earlier: list[Any] = []  # callbacks of this kind
        self._told: list[str] = []  # entries that the file cannot hold, once a warning has told of them
        self._told_metrics: set[str] = (
            set()
        )  # of which ModelCheckpoints keep the worst, or that max_drop does not limit
        self.first_batch = None

    def _reset_results(self) -> None:
        self.quantized_paths: dict[str, str] = {}
        self.float_path: str | None = None
        self.plan: Plan | None = None
        self.plans: dict[str, Plan] = {}
        self.results: Results = {}
        self.search: Search | None = None
        self.error: TinyQError | None = None

    def _outcome(self) -> dict[str, Any]:
        """What a run has set for the user, by attribute."""
        return {name: getattr(self, name) for name in _OUTCOME}

    @property
    def quantized_path(self) -> str | None:
        """Path of the file that was written (with several methods, of the first), or None."""
        return next(iter(self.quantized_paths.values()), None)
