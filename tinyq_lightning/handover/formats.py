"""The table of formats that a quantized model can be written in.

To add a format that runs somewhere, write one file with two functions and add a :class:`Program` to ``FORMATS``:

- ``write(request, path)`` writes what :class:`~tinyq_lightning.handover.request.Request` asks for and returns notes for
  the report: sentences that say what the runtime does on its own. It may write further files into the same folder, with
  names that begin with the stem of ``path``. It is called with gradients off and warnings silenced, and need not put
  anything back. It raises :class:`~tinyq_lightning.errors.ExportError` for a model that the format cannot hold; any
  other exception becomes one that says what failed.
- ``open(path, request)`` loads the file into the real runtime, with ``request.threads`` threads and, if the format has
  ``exact`` ones, with ``request.settings``. It returns a function from an
  :class:`~tinyq_lightning.handover.example.Example` to the output's tensors, in the order of ``request.output_names``.

Libraries are imported inside of these functions. ``modules`` names them, so that a missing one is an error that names
the ``extra`` of the package; the extra goes into ``pyproject.toml``, and the format's line for the help into
``FORMAT_NAMES`` of ``methods.py``. Everything else (temporary files, comparing, timing, overwriting, the report, the
command line) is done for all formats alike.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tinyq_lightning.errors import ExportError, MissingExtraError
from tinyq_lightning.file import read_checkpoint, read_safetensors, write_checkpoint, write_safetensors
from tinyq_lightning.handover.aoti import open_aoti, write_aoti
from tinyq_lightning.handover.compressed_tensors import open_compressed_tensors, write_compressed_tensors
from tinyq_lightning.handover.example import Example
from tinyq_lightning.handover.onnx_file import ONNX_EXACT, open_onnx, write_onnx
from tinyq_lightning.handover.openvino_file import OPENVINO_EXACT, open_openvino, write_openvino
from tinyq_lightning.handover.programs import open_pt2, write_pt2
from tinyq_lightning.handover.request import Request
from tinyq_lightning.methods import ACTIVATIONS, STATIC_FORMATS

__all__ = [
    "FORMATS",
    "Format",
    "Program",
    "Run",
    "Tensors",
    "format_for",
]

Run = Callable[[Example], Sequence[Tensor]]


@dataclass(frozen=True)
class Format:
    """What all formats have.

    Attributes:
        name: as users write it.
        ending: of its files.
        modules: libraries that it imports.
        extra: of this package, which installs them.
        by_ending: whether a path with its ending means this format, if the user names none.
        has_operators: whether its graph is of ONNX operators, which torch 2.7 cannot export.
    """

    name: str
    ending: str
    modules: tuple[str, ...] = ()
    extra: str = ""
    by_ending: bool = True
    has_operators: bool = False

    def check_installed(self) -> None:
        """Check that its libraries are there.

        Raises:
            ExportError: torch is too old for it.
            MissingExtraError: one is not installed.
        """
        if self.has_operators and not hasattr(torch.onnx, "ops"):
            raise ExportError(f"the format {self.name} needs torch 2.8 or newer, and this is torch {torch.__version__}")
        missing = [name for name in self.modules if importlib.util.find_spec(name) is None]
        if missing:
            raise MissingExtraError(
                f"the format {self.name} needs {' and '.join(missing)}: pip install 'tinyq-lightning[{self.extra}]'"
            )


@dataclass(frozen=True)
class Program(Format):
    """A format that runs somewhere: see the module's docstring.

    Attributes:
        write: writes it.
        open: loads it into its runtime.
        max_error: the relative error that is allowed if the user gives none.
        max_static_error: the same for static activations.
        exact: settings of the runtime with which it rounds no activations on its own; none if it never does.
        rounds_as_layers: whether activations are rounded in it as the methods of the layers say.
    """

    write: Callable[[Request, str], Sequence[str]] = lambda request, path: ()
    open: Callable[[str, Request], Run] = lambda path, request: lambda example: ()
    max_error: float = 0.01
    max_static_error: float = 0.3
    exact: Mapping[str, str] = field(default_factory=dict)
    rounds_as_layers: bool = True

    @property
    def static(self) -> bool:
        """Whether it can hold static activations."""
        return self.name in STATIC_FORMATS

    def check_activations(self, activations: str) -> None:
        """Check that it can hold activations that are rounded so.

        Raises:
            ExportError: it cannot, or there is no such way.
        """
        if activations not in ACTIVATIONS:
            raise ExportError(f"activations must be one of {', '.join(ACTIVATIONS)}, not {activations!r}")
        if activations != "dynamic" and not self.static:
            raise ExportError(f"the format {self.name} rounds activations as they come: leave activations out")

    def bound(self, activations: str) -> float:
        """The relative error that is allowed if the user gives none."""
        return self.max_error if activations == "dynamic" else self.max_static_error


@dataclass(frozen=True)
class Tensors(Format):
    """A file that holds the content of a quantized checkpoint and does not run.

    Attributes:
        write: writes the content.
        read: reads it again, and checks that it is undamaged.
    """

    write: Callable[[Mapping[str, Any], str], None] = lambda content, path: None
    read: Callable[[str], dict[str, Any]] = lambda path: {}


_LIST: tuple[Format, ...] = (
    Program(
        name="pt2",
        ending=".pt2",
        write=write_pt2,
        open=open_pt2,
    ),
    Program(
        name="aoti",
        ending=".aoti.pt2",
        by_ending=False,
        write=write_aoti,
        open=open_aoti,
    ),
    Program(
        name="onnx",
        ending=".onnx",
        modules=("onnx", "onnxscript", "onnxruntime"),
        extra="onnx",
        has_operators=True,
        write=write_onnx,
        open=open_onnx,
        max_error=0.1,
        exact=ONNX_EXACT,
    ),
    Program(
        name="openvino",
        ending=".xml",
        modules=("onnx", "onnxscript", "openvino"),
        extra="openvino",
        has_operators=True,
        write=write_openvino,
        open=open_openvino,
        max_error=0.15,
        exact=OPENVINO_EXACT,
        rounds_as_layers=False,
    ),
    Tensors(
        name="safetensors",
        ending=".safetensors",
        modules=("safetensors",),
        extra="safetensors",
        write=write_safetensors,
        read=read_safetensors,
    ),
    Program(
        name="compressed-tensors",
        ending="-compressed",
        modules=("transformers", "compressed_tensors", "safetensors"),
        extra="compressed-tensors",
        by_ending=False,
        write=write_compressed_tensors,
        open=open_compressed_tensors,
        max_error=0.05,
    ),
    Tensors(
        name="ckpt",
        ending=".ckpt",
        write=write_checkpoint,
        read=read_checkpoint,
    ),
)

FORMATS: dict[str, Format] = {each.name: each for each in _LIST}
"""By the name that users give as ``to``."""


def format_for(path: str, to: str | None) -> Format:
    """The format that is asked for.

    Args:
        path: where it is to be written.
        to: name of the format; None to go by the ending of the path.

    Raises:
        ExportError: there is no such format, or torch is too old for it.
        MissingExtraError: it needs a library that is not installed.
    """
    if to is None:
        ending = os.path.splitext(path)[1].lower()
        found = next((each for each in FORMATS.values() if each.by_ending and each.ending == ending), None)
        if found is None:
            endings = ", ".join(f"{each.ending} ({each.name})" for each in FORMATS.values() if each.by_ending)
            raise ExportError(
                f"{path}: its ending names no format: it is one of {endings}; or give to=, one of {', '.join(FORMATS)}"
            )
    elif to in FORMATS:
        found = FORMATS[to]
    else:
        raise ExportError(f"there is no format {to!r}: it is one of {', '.join(FORMATS)}")
    found.check_installed()
    return found
