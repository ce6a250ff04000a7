"""An exported file in the place of a module's method, so that the user's own loop measures it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tinyq_lightning.errors import ExportError
from tinyq_lightning.handover.dynamic import DynamicDims
from tinyq_lightning.handover.example import Example, named_arguments
from tinyq_lightning.handover.formats import FORMATS, Program, Run, format_for
from tinyq_lightning.handover.outputs import emptied, filled, tensors_of
from tinyq_lightning.handover.request import Request

__all__ = [
    "session_forward",
]


@contextmanager
def session_forward(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    to: str | None = None,
    method: str = "forward",
    threads: int | None = None,
) -> Iterator[None]:
    """Context manager in which a method of a module runs an exported file.

    ``trainer.validate(model)`` inside of it gives the metrics of what was exported, in its own runtime::

        with session_forward(model, "net.onnx"):
            trainer.validate(model, datamodule=data)

    The method is run itself once, on the first inputs, for the structure of what it returns. Numbers and text among
    its outputs stay those of that call, also a number taken from a size; objects that no file holds, such as a cache,
    are None.

    Args:
        model: the module that was exported, or the float one; on any device.
        path: what was exported.
        to: its format, if its ending does not tell.
        method: the method that was exported.
        threads: of the runtime; by default as many as torch takes.

    Raises:
        ExportError: the format does not run; the file gives another number of tensors than the method; or the block
            did not call the method, so that what it measured is not the exported file.
    """
    wanted = format_for(os.fspath(path), to)
    if not isinstance(wanted, Program):
        runs = ", ".join(each.name for each in FORMATS.values() if isinstance(each, Program))
        raise ExportError(f"the format {wanted.name} does not run: session_forward takes one of {runs}")
    if not os.path.exists(path):
        raise ExportError(f"{os.fspath(path)}: there is no such file")
    in_place = _InPlace(model, getattr(model, method), wanted, os.fspath(path), threads or torch.get_num_threads())
    former = vars(model).get(method)
    vars(model)[method] = in_place
    try:
        yield
    finally:
        del vars(model)[method]
        if former is not None:
            vars(model)[method] = former
    if not in_place.calls:
        raise ExportError(
            f"nothing called {type(model).__name__}.{method}, so {os.fspath(path)} was not run and what was measured "
            "is the model itself: call self(...) in its steps, or give the method that they call"
        )


class _InPlace:
    """Takes the place of a bound method.

    Attributes:
        calls: how many there were.
    """

    def __init__(self, model: nn.Module, own: Callable[..., Any], wanted: Program, path: str, threads: int) -> None:
        self._model, self._own, self._wanted, self._path, self._threads = model, own, wanted, path, threads
        self._run: Run | None = None
        self._outputs: Any = None
        self.calls = 0

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the file, in the structure, dtypes and on the device of the method's own."""
        device = next((leaf.device for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        on_cpu = pytree.tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        example = Example(on_cpu[0], on_cpu[1], named_arguments(self._own, *on_cpu))
        if self._run is None:
            self._outputs = emptied(self._own(*args, **kwargs))
            request = Request(self._model, example, DynamicDims({}, {}), (), threads=self._threads)
            self._run = self._wanted.open(self._path, request)
        outputs = self._run(example)
        self.calls += 1
        kinds = [tensor.dtype for tensor in tensors_of(self._outputs)]
        if len(outputs) != len(kinds):
            raise ExportError(
                f"{self._path} gives {len(outputs)} tensors, and what {type(self._model).__name__} returns has "
                f"{len(kinds)}: give the method that was exported, of a model in the same state"
            )
        return filled(self._outputs, (each.to(device, kind) for each, kind in zip(outputs, kinds, strict=True)))
