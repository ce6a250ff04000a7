"""Example inputs that the command line describes by shape and dtype: ``1x3x32x32``, ``2x16:int64:30522``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "InputShape",
    "Shapes",
    "drawn",
]

_FLOATS = ("float32", "float64", "float16", "bfloat16")
_INTEGERS = ("int64", "int32", "bool")

_FORM = re.compile(r"(?P<sizes>\d+(x\d+)*)(:(?P<dtype>\w+)(:(?P<below>\d+))?)?")


@dataclass(frozen=True)
class InputShape:
    """A tensor to draw.

    Attributes:
        sizes: the shape, the batch first.
        dtype: the name of torch's dtype.
        below: of whole numbers: what all of them are below.
    """

    sizes: tuple[int, ...]
    dtype: str = "float32"
    below: int = 2

    @classmethod
    def parse(cls, text: str) -> InputShape:
        """Read ``SHAPE[:DTYPE[:BELOW]]``, as in ``1x3x32x32`` and ``2x16:int64:30522``.

        Raises:
            ArgumentTypeError: it is written otherwise, has a size of 0 or a dtype that is none of these.
        """
        found = _FORM.fullmatch(text)
        if found is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not SHAPE[:DTYPE[:BELOW]], as 1x3x32x32 or 2x16:int64:30522")
        sizes = tuple(int(size) for size in found["sizes"].split("x"))
        if not all(sizes):
            raise argparse.ArgumentTypeError(f"{text!r} has a size of 0")
        dtype, below = found["dtype"] or "float32", found["below"]
        if dtype not in (*_FLOATS, *_INTEGERS):
            raise argparse.ArgumentTypeError(f"{dtype!r} in {text!r} is none of {', '.join((*_FLOATS, *_INTEGERS))}")
        if below is not None and (dtype not in ("int64", "int32") or not 0 < int(below) < 2**31):
            raise argparse.ArgumentTypeError(
                f"{below} in {text!r}: what numbers are below is said of int64 and int32, and is 1 to 2³¹ - 1"
            )
        return cls(sizes, dtype, 2 if below is None else int(below))


class Shapes(argparse.Action):
    """Collects tensors to draw: each word is one (``4x8 2x16:int64``), or all are the sizes of one (``4 8``)."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Add what the words describe."""
        words = ["x".join(values)] if all(word.isdecimal() for word in values) else values
        try:
            found = [InputShape.parse(word) for word in words]
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument {option_string}: {error}")
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), *found])


def drawn(shapes: Sequence[InputShape]) -> tuple[Tensor, ...]:
    """A random tensor of each shape, the same ones each time: normal numbers, or whole ones from 0."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(each.sizes, generator=generator).to(getattr(torch, each.dtype))
        if each.dtype in _FLOATS
        else torch.randint(each.below, each.sizes, generator=generator).to(getattr(torch, each.dtype))
        for each in shapes
    )
