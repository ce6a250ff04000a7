"""In what a quantized checkpoint differs from one that was made again of the same float file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tinyq_lightning.file import digest_of

__all__ = [
    "chosen_by_data",
    "differences",
]


def differences(content: Mapping[str, Any], again: Mapping[str, Any]) -> list[str]:
    """Names of tensors and entries that differ.

    Metrics and versions depend on the run, codes and biases of calibrated layers on its data. They are not compared.

    Args:
        content: of a quantized checkpoint.
        again: of one that was made without data.
    """
    by_data = chosen_by_data(content["tinyq"])
    states = [_without_codes(each["state_dict"], by_data) for each in (content, again)]
    plans = [{"plan": _comparable(each["tinyq"]["plan"], by_data)} for each in (content, again)]
    apart = ("state_dict", "tinyq", "pytorch-lightning_version")
    rest = [{key: value for key, value in each.items() if key not in apart} for each in (content, again)]
    return [
        prefix + name
        for prefix, (one, other) in (("state_dict.", states), ("tinyq.", plans), ("", rest))
        for name in {**one, **other}
        if name not in one or name not in other or digest_of(one[name]) != digest_of(other[name])
    ]


def chosen_by_data(tinyq: Mapping[str, Any]) -> set[str]:
    """The names of the layers whose codes or biases calibration has chosen."""
    share = {entry["name"]: entry.get("output_error") for entry in tinyq["plan"]}
    return {name for name, each in share.items() if each is not None and each < 1}


def _without_codes(state_dict: Mapping[str, Any], layers: Collection[str]) -> dict[str, Any]:
    chosen = {f".{name}.{part}" for name in layers for part in ("int8_weights", "int4_weights", "bias")}
    return {key: value for key, value in state_dict.items() if not any(f".{key}".endswith(each) for each in chosen)}


def _comparable(plan: Sequence[Mapping[str, Any]], by_data: Collection[str]) -> list[dict[str, Any]]:
    """The entries without what only data tells."""
    found = []
    for entry in plan:
        left = {"output_error", "uncalibrated", *(["weight_sqnr_db"] if entry["name"] in by_data else [])}
        found.append({key: value for key, value in entry.items() if key not in left})
    return found
