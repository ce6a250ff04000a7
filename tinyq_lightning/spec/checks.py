"""What the values of a spec may be: checked once, when a ``QuantizationSpec`` is made, from whatever source."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, get_args

from tinyq_lightning.methods import (
    ACTIVATIONS,
    FORMAT_NAMES,
    KERNELS,
    KIND_NAMES,
    LADDER,
    METHODS,
    STATIC_FORMATS,
    TENSOR_FORMATS,
)
from tinyq_lightning.spec.parts import Budget, Calibrate, Export, Rule, RuleBy, Save
from tinyq_lightning.spec.reader import Reader, shown

__all__ = [
    "METHOD_NAMES",
    "Keep",
    "NonFinite",
    "Weights",
    "When",
    "check_budget",
    "check_calibrate",
    "check_choices",
    "check_export",
    "check_kinds",
    "check_methods",
    "check_on_ladder",
    "check_rule",
    "check_save",
]

When = Literal["fit_end", "test_start"]


Weights = Literal["best", "last", "current"]


NonFinite = Literal["error", "float"]


Keep = Literal["all", "smallest"]


METHOD_NAMES = (*METHODS, "float")
"""What may stand for ``method``; ``float`` leaves a layer alone."""


EXPORTS = tuple(name for name in FORMAT_NAMES if name != "ckpt")
"""What a run can write beside the checkpoint."""


_CHOICES: Mapping[str, tuple[str, ...]] = {
    "when": get_args(When),
    "weights": get_args(Weights),
    "kernel": KERNELS,
    "non_finite": get_args(NonFinite),
    "keep": get_args(Keep),
}


# File systems take 255; the files beside the checkpoint have longer endings.
_MAX_NAME_BYTES = 200


def check_choices(values: Mapping[str, Any], reader: Reader) -> None:
    """Refuse a value that is not one of those its key allows."""
    for key, known in _CHOICES.items():
        reader.choice(values[key], known, f"value of {key}", key)


def check_kinds(kinds: Any, reader: Reader) -> tuple[str, ...]:
    """The kinds in the order of ``KIND_NAMES``, from ``all`` or a list of some of them."""
    if isinstance(kinds, str) and kinds == "all":
        return KIND_NAMES
    if isinstance(kinds, str) and kinds not in KIND_NAMES:
        reader.choice(kinds, ("all", *KIND_NAMES), "kind", "kinds")
    given, below = reader.items(kinds, "kinds"), reader.below("kinds")
    if not given:
        reader.fail(f"the list of kinds is empty. Write all, or choose from: {', '.join(KIND_NAMES)}", "kinds")
    for index, each in enumerate(given):
        below.choice(each, KIND_NAMES, "kind", index)
        if each in given[:index]:
            below.fail(f"{each!r} is in the list twice", index)
    return tuple(name for name in KIND_NAMES if name in given)


def check_export(given: Any, reader: Reader) -> tuple[Export, ...]:
    """The exports, from the name of a format, a mapping, or a list of some."""
    one = isinstance(given, str | Mapping | Export)
    asked, below = [given] if one else reader.items(given, "export"), reader.below("export")
    found: list[Export] = []
    for index, each in enumerate(asked):
        if not isinstance(each, Mapping | Export):
            reader.choice(each, EXPORTS, "format", "export") if one else below.choice(each, EXPORTS, "format", index)
            each = Export(each)
        place = below if one else below.below(index)
        made = _export_of(each, place)
        if any((made.to, made.activations) == (other.to, other.activations) for other in found):
            place.fail(f"{made.to!r} is in the list twice")
        found.append(made)
    return tuple(found)


def _export_of(given: Mapping[str, Any] | Export, reader: Reader) -> Export:
    if isinstance(given, Mapping):
        given = Export(**reader.mapping(dict(given), [field.name for field in fields(Export)], required=("to",)))
    reader.choice(given.to, EXPORTS, "format", "to")
    reader.choice(given.activations, ACTIVATIONS, "way to round activations", "activations")
    if given.is_static and given.to not in STATIC_FORMATS:
        reader.fail(
            f"the format {given.to} rounds activations as they come. Static ones: {', '.join(STATIC_FORMATS)}",
            "activations",
        )
    if isinstance(given.batches, bool) or not isinstance(given.batches, int) or given.batches < 1:
        reader.fail(f"batches must be a whole number of at least 1, not {shown(given.batches)}", "batches")
    if given.measure is not None:
        reader.flag(given.measure, "measure")
    if given.measure and given.to in TENSOR_FORMATS:
        reader.fail(f"the format {given.to} does not run, so it cannot be measured", "measure")
    return given


def check_methods(method: Any, methods: Sequence[Any], reader: Reader) -> None:
    """Refuse an unknown method, or a list of methods that cannot be compared."""
    if not methods:
        reader.choice(method, METHOD_NAMES, "method")
    below = reader.below("method")
    for index, each in enumerate(methods):
        if each == "float":
            below.fail("'float' is no method to compare: the float model is measured in any case", index)
        below.choice(each, tuple(METHODS), "method", index)
        if each in methods[:index]:
            below.fail(f"{each!r} is in the list twice", index)


def check_rule(rule: Rule, reader: Reader) -> Rule:
    """The rule, with a number as its pattern made text."""
    if not isinstance(rule, Rule):
        reader.fail(f"a rule must be a Rule, not {shown(rule)}: QuantizationSpec.from_dict takes mappings")
    match = reader.pattern(rule.match, "match")
    reader.choice(rule.method, METHOD_NAMES, "method")
    reader.text(rule.reason, "reason")
    reader.choice(rule.decided_by, get_args(RuleBy), "decided_by")
    return rule if match is rule.match else replace(rule, match=match)


def check_save(save: Save, reader: Reader) -> None:
    """Refuse a file name that is none, or that ModelCheckpoint would take for its own."""
    reader.text(save.dirpath, "dirpath")
    name = reader.text(save.filename, "filename") or ""
    if "/" in name or "\\" in name:
        reader.fail(f"filename {name!r} must be a name without folders: use dirpath for those", "filename")
    if re.match(r"last(-v?\d+)?(\.|-|$)", name):
        reader.fail(f"filename {name!r} is one that ckpt_path='last' would pick up: begin it otherwise", "filename")
    if "{" in name:
        reader.fail(f"filename {name!r} is taken as it is: nothing is put in for braces", "filename")
    if "\0" in name or len(name.encode()) > _MAX_NAME_BYTES:
        reader.fail(
            f"filename {name[:40]!r}… is no name of a file: at most {_MAX_NAME_BYTES} bytes, none zero", "filename"
        )


def check_budget(budget: Budget, reader: Reader) -> Budget:
    """The budget, with a share such as `` 1% `` written without the blanks around it."""
    if not isinstance(budget, Budget):
        reader.fail(f"a budget must be a Budget, not {shown(budget)}: QuantizationSpec.from_dict takes mappings")
    drop: Any = budget.max_drop
    evals, seconds = budget.max_evals, budget.max_seconds
    share = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*%\s*", drop) if isinstance(drop, str) else None
    if not share and not _is_number(drop):
        reader.fail(f"max_drop must be a number of at least 0 or a share such as '1%', not {shown(drop)}", "max_drop")
    if evals is not None and not _is_count(evals):
        reader.fail(f"max_evals must be a whole number of at least 1, not {shown(evals)}", "max_evals")
    if seconds is not None and not (_is_number(seconds) and seconds > 0):
        reader.fail(f"max_seconds must be a number above 0, not {shown(seconds)}", "max_seconds")
    if budget.mode is not None:
        reader.choice(budget.mode, ("min", "max"), "mode")
    if budget.monitor is None or reader.text(budget.monitor, "monitor") is None:
        reader.fail("a budget needs monitor, the name of the metric that may lose max_drop, such as val_acc")
    if budget.ladder is not None:
        _check_ladder(budget.ladder, reader)
    return replace(budget, max_drop=drop.strip()) if isinstance(drop, str) else budget


def _check_ladder(ladder: Sequence[Any], reader: Reader) -> None:
    """Refuse a ladder of unknown methods, of none but ``float``, or whose methods do not grow."""
    below = reader.below("ladder")
    for index, each in enumerate(ladder):
        below.choice(each, LADDER, "method", index)
        if index and LADDER.index(each) <= LADDER.index(ladder[index - 1]):
            below.fail(
                f"{each} stands after {ladder[index - 1]}: a ladder goes up, as {' → '.join(LADDER)} does", index
            )
    if not ladder or ladder[0] == "float":
        reader.fail("a ladder begins with a method that is not float", "ladder")


def check_on_ladder(budget: Budget, methods: Sequence[str], reader: Reader) -> None:
    """Refuse a method that is asked for and is not on the budget's ladder."""
    ladder = budget.ladder or methods
    for method in methods:
        if method not in ladder:
            reader.fail(f"the ladder {', '.join(ladder)} lacks {method}, the method that is asked for", "ladder")


def check_calibrate(calibrate: Any, has_four_bits: bool, reader: Reader) -> None:
    """Refuse what is no number of batches, and a spec without codes of four bits, which alone are chosen with data.

    Args:
        calibrate: of the spec.
        has_four_bits: whether the spec names a method of four bits.
        reader: of the key.
    """
    if not isinstance(calibrate, Calibrate):
        reader.fail(f"calibrate must be a Calibrate, not {shown(calibrate)}: QuantizationSpec.from_dict takes mappings")
    if not _is_count(calibrate.batches):
        given = shown(calibrate.batches)
        reader.fail(f"batches must be a whole number of at least 1, not {given}", "batches")
    if not has_four_bits:
        reader.fail("calibrate chooses codes of four bits, and no method here has four: ask for one, or leave it out")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    """Finite and not negative."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
