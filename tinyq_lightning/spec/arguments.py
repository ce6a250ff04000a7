"""The callback's arguments over its spec: read as the YAML is, and refused as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tinyq_lightning.errors import SpecError
from tinyq_lightning.spec.places import Origin
from tinyq_lightning.spec.reader import Reader
from tinyq_lightning.spec.spec import QuantizationSpec, parse_budget, parse_calibrate

__all__ = [
    "with_arguments",
]


def with_arguments(
    spec: QuantizationSpec,
    exclude: Sequence[str],
    keys: Mapping[str, Any],
    budget: Mapping[str, Any],
    save: Mapping[str, Any],
) -> QuantizationSpec:
    """The spec with what was given as arguments; None stands for what was not.

    Args:
        spec: as read.
        exclude: patterns added to those of the spec.
        keys: over the spec's own.
        budget: over the keys of its budget; ``monitor`` alone makes no budget.
        save: over the keys of its ``save``.

    Raises:
        SpecError: an argument is wrong, or contradicts another or the spec.
    """
    if isinstance(exclude, str):
        raise SpecError(f"exclude must be a list of patterns, not the text {exclude!r}: write [{exclude!r}]")
    given, limits = _given(keys), _given(budget)
    if "calibrate" in given:
        given["calibrate"] = parse_calibrate(given["calibrate"], Reader(Origin()))
    asked = spec.budget
    if asked is not None or "max_drop" in limits:
        below = Reader(Origin(), ("budget",))
        asked = replace(asked, **limits) if asked is not None else parse_budget(limits, below)
    elif "mode" in limits:
        raise SpecError("mode belongs to a budget: give max_drop as well, or leave it out")
    files = {name: str(value) for name, value in _given(save).items()}
    # without the places of the spec's keys: an error from here is about an argument
    result = replace(
        spec,
        **given,
        exclude=(*spec.exclude, *exclude),
        budget=asked,
        save=replace(spec.save, **files),
        origin=Origin(),
    )
    result = replace(result, origin=spec.origin)
    _refuse_contradictions(result)
    if result.when == "test_start":
        _refuse_idle(spec, {**given, **limits})
    return result


def _refuse_idle(spec: QuantizationSpec, given: Mapping[str, Any]) -> None:
    """Refuse what only the end of a fit looks at, in a callback that acts at the start of a test."""
    idle = {name: given[name] for name in ("weights", "monitor") if name in given}
    if spec.when == "test_start" and spec.weights != "best":  # a spec that is written whole has the default
        idle.setdefault("weights", spec.weights)
    for name, value in idle.items():
        where = "argument" if name in given else spec.origin.where(name)
        raise SpecError(
            f"{where}: {name}={value!r} chooses weights at the end of a fit, and with when='test_start' those tested "
            f"are quantized: leave {name} out, and give Trainer.test the checkpoint as ckpt_path"
        )


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _refuse_contradictions(spec: QuantizationSpec) -> None:
    """Refuse what each key allows and all together do not."""
    where = spec.origin.where
    if spec.budget and spec.when == "test_start":
        raise SpecError(
            f"{where('budget')}: a budget needs when: fit_end. A search measures many plans, so it belongs on the "
            "validation set: a plan chosen by its test score would make that score worthless"
        )
    if spec.keep == "smallest" and not spec.budget:
        raise SpecError(
            f"{where('keep')}: keep: smallest needs a budget (monitor and max_drop): without one, the fewest bits "
            "would always be kept"
        )
