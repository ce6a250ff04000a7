"""Checks that the codes of a layer in a state dict have the form that their bits ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tinyq_lightning.layers import why_not_packed

__all__ = [
    "CODES",
    "why_malformed",
]

CODES = {8: "int8_weights", 4: "int4_weights"}
"""The name of the codes in a state dict, by their bits."""


def why_malformed(state: Mapping[str, Any], prefix: str, bits: int) -> str:
    """What is wrong with the codes of a weight in a state dict, beginning with the entry; empty if nothing is.

    Args:
        state: the state dict.
        prefix: of the weight, with its dot.
        bits: of the codes that the plan says it has.
    """
    name = CODES[bits]
    codes, scales = state.get(f"{prefix}{name}"), state.get(f"{prefix}scales")
    dtype = torch.int8 if bits == 8 else torch.uint8
    wrong = ""
    if not isinstance(codes, Tensor) or codes.dtype != dtype or codes.layout != torch.strided or codes.dim() < 2:
        wrong = f"{name} holds no codes of {dtype}"
    elif bits == 4 and codes.dim() > 2:
        wrong = f"{name} holds no codes of {dtype} in rows"
    elif not isinstance(scales, Tensor) or scales.dtype != torch.float32 or not _is_one_a_row(scales, codes):
        wrong = "scales is not one float32 for each row of codes"
    elif not bool((scales.isfinite() & (scales > 0)).all()):
        wrong = "scales holds what is no positive number"
    elif bits == 8 and codes.numel() and int(codes.min()) < -127:
        wrong = f"{name} holds -128, which no code is"
    elif bits == 4:
        columns = 2 * codes.shape[1]  # or one less, of which there are as many groups
        wrong = why_not_packed(codes, state.get(f"{prefix}multipliers"), (len(codes), columns))
    return prefix + wrong if wrong else ""


def columns_of(state: Mapping[str, Any], prefix: str, float_bytes: int) -> int | None:
    """The columns of a weight of four bits, of which packed codes tell all but whether the last one is there.

    Args:
        state: the state dict.
        prefix: of the weight, with its dot.
        float_bytes: of weight and bias, as the plan has them.

    Returns:
        The columns; None if the bytes fit none.
    """
    rows, pairs = state[f"{prefix}{CODES[4]}"].shape
    biases = int(f"{prefix}bias" in state)
    fits = (
        each
        for each in (2 * pairs, 2 * pairs - 1)
        for size in (4, 2, 8)
        if rows * (each + biases) * size == float_bytes
    )
    return next(fits, None)


def _is_one_a_row(scales: Tensor, codes: Tensor) -> bool:
    """Whether there is a scale for each row of a matrix, or for each of some equal parts of more dimensions."""
    if codes.dim() == 2:
        return scales.shape == codes.shape[:1]
    return scales.dim() == 1 and bool(scales.numel()) and codes.numel() % scales.numel() == 0
