"""Which entry of a spec decides for a layer, by its names alone."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import NamedTuple

from tinyq_lightning.spec.spec import QuantizationSpec

__all__ = [
    "Wanted",
    "deciding_rule",
    "excluding",
    "names_parameter",
    "pattern_matches",
    "wanted_method",
]


def pattern_matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` covers the layer with the dotted path ``name``.

    A pattern is a leaf name (``lm_head``), a dotted path, a glob over the dotted path, or ``re:`` and a
    regular expression matched in full. A path, globbed or not, also covers everything below it.

    >>> pattern_matches("head", "decoder.head"), pattern_matches("decoder", "decoder.head")
    (True, True)
    >>> pattern_matches("layers.*.linear2", "encoder.layers.0.linear2")
    False
    >>> pattern_matches("re:.*linear[12]", "encoder.layers.0.linear2")
    True
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    parts = name.split(".")
    if pattern == parts[-1]:
        return True
    above = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return any(path == pattern or fnmatch.fnmatchcase(path, pattern) for path in above)


def names_parameter(spec: QuantizationSpec, path: str) -> bool:
    r"""Whether a rule names the parameter with this dotted path itself, not only a module above it.

    Its pattern matches the whole path and ends with the parameter's name, without a glob there; or, of the entries of
    a list of parameters, with the name of the list and ``.*``. A regular expression ends with the name in letters, or
    with an alternation of names, or of a list with ``\d+``.

    >>> from tinyq_lightning.spec import as_spec
    >>> spec = as_spec({"rules": [{"match": "layers.*.experts.up", "method": "w8a32"}]})
    >>> names_parameter(spec, "layers.0.experts.up"), names_parameter(spec, "layers.0.experts.down")
    (True, False)
    >>> spec = as_spec({"rules": [{"match": "codebooks.*", "method": "w8a32"}]})
    >>> names_parameter(spec, "codebooks.0"), names_parameter(spec, "codebooks.experts.up")
    (True, False)
    """
    return any(_names(rule.match, path) for rule in spec.rules)


def _names(pattern: str, path: str) -> bool:
    holder, _, leaf = path.rpartition(".")
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], path) is not None and _ends_with(pattern[3:], leaf)
    of_list = f"{holder.rpartition('.')[2]}.*" if holder and leaf.isdecimal() else None
    if pattern in (leaf, of_list):
        return pattern == leaf or fnmatch.fnmatchcase(path, pattern)
    ends = pattern.endswith(f".{leaf}") or (of_list is not None and pattern.endswith(f".{of_list}"))
    return ends and fnmatch.fnmatchcase(path, pattern)


def _ends_with(expression: str, leaf: str) -> bool:
    """Whether a regular expression ends with this name in letters, alone or among others, or with digits for digits."""
    last = expression.rpartition(r"\.")[2]
    if leaf.isdecimal() and last in (r"\d", r"\d+", "[0-9]", "[0-9]+"):
        return True
    if last.startswith("(") and last.endswith(")"):
        return re.escape(leaf) in last[1:-1].removeprefix("?:").split("|")
    return re.search(rf"(?<!\\){re.escape(re.escape(leaf))}$", expression) is not None


def excluding(spec: QuantizationSpec, names: Sequence[str]) -> str | None:
    """The pattern that excludes a layer with these names, if any."""
    return next((p for p in spec.exclude for name in names if pattern_matches(p, name)), None)


def deciding_rule(spec: QuantizationSpec, names: Sequence[str]) -> int | None:
    """The index of the rule that decides for a layer with these names; None where the spec's method does."""
    if excluding(spec, names) is not None:
        return None
    rules = enumerate(spec.rules)
    return next((i for i, rule in rules if any(pattern_matches(rule.match, name) for name in names)), None)


class Wanted(NamedTuple):
    """What the spec alone says of a layer.

    Attributes:
        method: the method.
        reason: why, as the plan shows it.
        decided_by: ``spec``, ``exclude``, or what the rule says: ``rule``, ``budget`` or ``timing``.
    """

    method: str
    reason: str
    decided_by: str


def wanted_method(spec: QuantizationSpec, names: Sequence[str]) -> Wanted:
    """What the spec alone says of a layer with these names."""
    if excluding(spec, names) is not None:
        return Wanted("float", "excluded", "exclude")
    index = deciding_rule(spec, names)
    if index is None:
        return Wanted(spec.method, "spec", "spec")
    rule = spec.rules[index]
    return Wanted(rule.method, rule.reason or f"rule {index + 1}", rule.decided_by)
