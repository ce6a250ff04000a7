"""Second moments of a layer's inputs: what the error of its outputs under other weights can be told from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = [
    "BLOCK_COLUMNS",
    "Moments",
    "moments_bytes",
]

BLOCK_COLUMNS = 4096
"""Inputs of more features are taken in blocks of this many: moments of features in different blocks are not kept."""


class Moments:
    """Sums over the inputs that some rows of weights are multiplied with; the inputs themselves are not kept.

    Args:
        parts: the rows of the weight are so many equal parts, each with inputs of its own, as the groups of a
            convolution are.
        columns: features of an input, as many as the weight has columns.
        device: where the sums are kept.

    Attributes:
        counts: how many inputs each part has had, ``[parts]`` float64.
        sums: ``[parts, columns]`` float64.
        blocks: ``[parts, k, k]`` float32 each: sums of products of two features, of each block of columns.
    """

    def __init__(self, parts: int, columns: int, device: torch.device | str = "cpu") -> None:
        if torch.device(device).type == "mps":  # which has no float64
            device = "cpu"
        self.counts = torch.zeros(parts, dtype=torch.float64, device=device)
        self.sums = torch.zeros(parts, columns, dtype=torch.float64, device=device)
        self.blocks = [
            torch.zeros(parts, size, size, dtype=torch.float32, device=device) for size in _block_sizes(columns)
        ]

    @property
    def parts(self) -> int:
        """How many parts the rows have."""
        return self.sums.shape[0]

    @property
    def is_empty(self) -> bool:
        """Whether a part has had no input."""
        return not bool(self.counts.all())

    @property
    def is_finite(self) -> bool:
        """Whether all sums are: not so if an input was NaN or infinite, or its square beyond float32."""
        return all(bool(torch.isfinite(each).all()) for each in (self.sums, *self.blocks))

    @property
    def means(self) -> Tensor:
        """``[parts, columns]`` float64; zeros without any input."""
        return self.sums / self.counts.clamp_min(1)[:, None]

    def add(self, inputs: Tensor, first: int = 0) -> None:
        """Add inputs of some parts.

        Args:
            inputs: ``[some parts, n, columns]``, any floating dtype.
            first: the first of these parts.
        """
        own = slice(first, first + inputs.shape[0])
        inputs = inputs.detach().to(self.sums.device, torch.float32)
        self.counts[own] += inputs.shape[1]
        self.sums[own] += inputs.sum(1, dtype=torch.float64)
        for block, part in zip(self.blocks, torch.split(inputs, BLOCK_COLUMNS, -1), strict=True):
            if part.is_cuda:  # whose float32 may be TF32
                part = part.double()
                block[own] += part.transpose(1, 2) @ part
            else:
                block[own].baddbmm_(part.transpose(1, 2), part)

    def tensors(self) -> tuple[Tensor, ...]:
        """All that was summed up: adding those of other moments in place adds their inputs."""
        return self.counts, self.sums, *self.blocks

    def add_all(self, other: Moments) -> None:
        """Add the inputs that other moments of the same sizes have had."""
        for own, theirs in zip(self.tensors(), other.tensors(), strict=True):
            own += theirs.to(own.device)

    def in_parts(self, parts: int) -> Moments:
        """The same moments for each of so many parts; of one part only."""
        made = Moments(parts, self.sums.shape[1], self.sums.device)
        made.add_all(self)  # broadcast
        return made

    def mean_change(self, change: Tensor) -> Tensor:
        """Mean change of each output under a change of the weight ``[rows, columns]``: ``[rows]`` float64."""
        change = torch.unflatten(change.detach().to(self.sums.device, torch.float64), 0, (self.parts, -1))
        return (change @ self.means[:, :, None]).flatten()

    def matrices(self, centred: bool) -> Iterator[tuple[slice, Tensor]]:
        """The columns of each block, and its moments for each input: ``[parts, k, k]`` float64, new on each call.

        Args:
            centred: about the means, not about zero.
        """
        start, means, counts = 0, self.means, self.counts.clamp_min(1)[:, None, None]
        for block in self.blocks:
            columns = slice(start, start + block.shape[-1])
            matrix = block.double().div_(counts)
            if centred:
                matrix.baddbmm_(means[:, columns, None], means[:, None, columns], alpha=-1)
            yield columns, matrix
            start = columns.stop

    def output_errors(self, change: Tensor, bias_changes: Sequence[Tensor | None] = (None,)) -> list[float]:
        """Mean over the inputs of the squared change of the outputs, summed over the outputs.

        Of features in different blocks only the means count.

        Args:
            change: of the weight, ``[rows, columns]``.
            bias_changes: the changes of the bias to tell this for, ``[rows]`` each; None for none.
        """
        shift = self.mean_change(change)
        change = torch.unflatten(change.detach().to(shift.device, torch.float32), 0, (self.parts, -1))
        about_mean = torch.zeros((), dtype=torch.float64, device=shift.device)
        for columns, matrix in self.matrices(centred=True):
            part = change[..., columns]
            passed_on = (part.double() @ matrix).float() if part.is_cuda else part @ matrix.float()
            about_mean += passed_on.mul_(part).sum(dtype=torch.float64)
        shifts = (shift if each is None else shift + each.detach().to(shift) for each in bias_changes)
        return [max(0.0, (about_mean + each.square().sum()).item()) for each in shifts]


def moments_bytes(parts: int, columns: int) -> int:
    """What :class:`Moments` of these sizes take, in bytes."""
    return parts * (8 * columns + sum(4 * size * size for size in _block_sizes(columns)))


def _block_sizes(columns: int) -> list[int]:
    return [min(BLOCK_COLUMNS, columns - start) for start in range(0, columns, BLOCK_COLUMNS)]
