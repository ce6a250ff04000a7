"""What the user asks for: YAML, mapping or arguments, parsed once into a frozen ``QuantizationSpec``."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tinyq_lightning.errors import SpecError
from tinyq_lightning.forward import KERNELS, METHODS, KernelName
from tinyq_lightning.origin import Origin, key_path, read_yaml

__all__ = [
    "METHOD_NAMES",
    "Budget",
    "QuantizationSpec",
    "Rule",
    "Save",
    "SpecLike",
    "as_spec",
    "nearest",
    "pattern_matches",
]

When = Literal["fit_end", "test_start"]
Weights = Literal["best", "last", "current"]
NonFinite = Literal["error", "float"]

METHOD_NAMES = (*METHODS, "float")
"""What may stand for ``method``; ``float`` leaves a layer alone."""


def nearest(word: str, known: Iterable[str], count: int = 1) -> str:
    """``Did you mean 'x'?``, or nothing where no known word is near."""
    close = difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


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


@dataclass(frozen=True)
class Rule:
    """A pattern and the method of the layers it covers.

    Attributes:
        match: the pattern, see :func:`pattern_matches`.
        method: ``w8a32``, ``w8a16``, ``w8a8`` or ``float``.
        reason: what the plan gives as the reason; ``rule N`` where none is given.
    """

    match: str
    method: str
    reason: str | None = None


@dataclass(frozen=True)
class Budget:
    """How much a metric may lose.

    Attributes:
        monitor: name of the logged metric.
        mode: ``max`` where more is better, ``min`` where less is.
        max_drop: the loss allowed, as a number in the metric's unit or ``"1%"`` of the float value.
    """

    monitor: str
    mode: Literal["min", "max"]
    max_drop: float | str


@dataclass(frozen=True)
class Save:
    """Where the quantized checkpoint goes.

    Attributes:
        dirpath: folder; None: beside the float checkpoint.
        filename: name with or without ``.ckpt``; None: ``<method>-<float stem>.ckpt``.
    """

    dirpath: str | None = None
    filename: str | None = None


@dataclass(frozen=True)
class QuantizationSpec:
    """A method for every Linear layer, exclusions, rules, and what happens when.

    Attributes:
        method: for every layer that nothing below names: ``w8a32``, ``w8a16``, ``w8a8`` or ``float``.
        exclude: patterns of layers that are never quantized.
        rules: the first one that matches decides; ``exclude`` wins over all.
        when: ``fit_end`` or ``test_start``.
        weights: which float weights: ``best``, ``last`` or ``current``.
        kernel: ``auto`` is the fastest here, ``int8`` has the same bits for any batch and thread count,
            ``reference`` is the textbook formula.
        non_finite: ``error`` refuses a layer with NaN or infinite weights, ``float`` leaves it alone.
        budget: how much a metric may lose, or None.
        save: where the file goes.
        origin: where each key was written, for errors.
    """

    method: str = "w8a32"
    exclude: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    when: When = "fit_end"
    weights: Weights = "best"
    kernel: KernelName = "auto"
    non_finite: NonFinite = "error"
    budget: Budget | None = None
    save: Save = field(default_factory=Save)
    origin: Origin = field(default_factory=Origin, compare=False, repr=False)

    @classmethod
    def from_yaml(cls, path: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> QuantizationSpec:
        """Read a spec from YAML; ``${...}`` interpolation is OmegaConf's.

        Args:
            path: a file, or several, the later ones merged over the earlier.
            overrides: dot-list entries such as ``"method=w8a16"`` or ``"rules.0.method=float"``.

        Raises:
            SpecError: no such file, broken YAML, or anything :meth:`from_dict` refuses; the message
                begins with the file and the line.
        """
        paths = [path] if isinstance(path, str | Path) else list(path)
        if not paths:
            raise SpecError("there is no YAML file to read the spec from")
        origin, configs = Origin(), []
        for each in paths:
            config, lines = read_yaml(each)
            configs.append(config)
            origin = origin.over(lines)
        try:
            merged = OmegaConf.merge(*configs)
            for override in overrides:
                _override(merged, override)
                origin = origin.replaced(key_path(override.partition("=")[0]), f"override {override!r}")
            content = OmegaConf.to_container(merged, resolve=True)
        except OmegaConfBaseException as error:
            raise SpecError(origin.explain(error)) from error
        return _parse(content, origin)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> QuantizationSpec:
        """Read a spec from a mapping with the same keys as the YAML.

        Raises:
            SpecError: an unknown key or method, or a value of the wrong type.
        """
        if not isinstance(d, Mapping) and not OmegaConf.is_dict(d):
            raise SpecError(f"a spec must be a mapping, for example {{'method': 'w8a32'}}, not {_shown(d)}")
        try:
            content = OmegaConf.to_container(OmegaConf.create(dict(d)), resolve=True)
        except OmegaConfBaseException as error:
            raise SpecError(Origin().explain(error)) from error
        return _parse(content, Origin())

    def to_dict(self) -> dict[str, Any]:
        """Plain data with the keys of the YAML; ``from_dict`` gives the same spec back."""
        rules = [
            {"match": rule.match, "method": rule.method} | ({"reason": rule.reason} if rule.reason else {})
            for rule in self.rules
        ]
        budget = self.budget and {
            "monitor": self.budget.monitor,
            "mode": self.budget.mode,
            "max_drop": self.budget.max_drop,
        }
        return {
            "method": self.method,
            "exclude": list(self.exclude),
            "rules": rules,
            "when": self.when,
            "weights": self.weights,
            "kernel": self.kernel,
            "non_finite": self.non_finite,
            "budget": budget,
            "save": {"dirpath": self.save.dirpath, "filename": self.save.filename},
        }

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The spec as YAML text, also written to ``path`` where one is given."""
        text = OmegaConf.to_yaml(OmegaConf.create(self.to_dict()))
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text


def _override(config: Any, override: str) -> None:
    """Set one key of ``config`` as ``override`` (``key=value``) says."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise SpecError(f"override {override!r}: write it as key=value, for example 'method=w8a16'")
    try:
        parsed = OmegaConf.from_dotlist([f"value={text}"])  # not resolved here: ${...} is about the whole spec
        value = cast("dict[str, Any]", OmegaConf.to_container(parsed))["value"]
        OmegaConf.update(config, key, value, force_add=True)
    except (OmegaConfBaseException, yaml.YAMLError, AssertionError, IndexError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SpecError(f"override {override!r} ({key}): {reason}") from error


SpecLike = str | Path | Mapping[str, Any] | QuantizationSpec


def as_spec(spec: SpecLike) -> QuantizationSpec:
    """A spec from a method name, a YAML path, a mapping, or a spec.

    Raises:
        SpecError: a string that is neither a method nor a YAML file, or a spec that is wrong.
    """
    if isinstance(spec, QuantizationSpec):
        return _parse(spec.to_dict(), spec.origin)
    if isinstance(spec, Mapping) or OmegaConf.is_dict(spec):
        return QuantizationSpec.from_dict(cast("Mapping[str, Any]", spec))
    if isinstance(spec, Path) or (isinstance(spec, str) and spec.endswith((".yaml", ".yml"))):
        return QuantizationSpec.from_yaml(spec)
    if isinstance(spec, str):
        return QuantizationSpec.from_dict({"method": spec})
    raise SpecError(
        f"a spec is a method name, a path to YAML, a mapping or a QuantizationSpec, not {type(spec).__name__}"
    )


class _Reader:
    """Takes typed values out of plain data; every error says where the value was written."""

    def __init__(self, origin: Origin, path: tuple[str | int, ...] = ()) -> None:
        self.origin, self.path = origin, path

    def fail(self, message: str, *keys: str | int) -> NoReturn:
        raise SpecError(f"{self.origin.where(*self.path, *keys)}: {message}")

    def below(self, *keys: str | int) -> _Reader:
        return _Reader(self.origin, (*self.path, *keys))

    def mapping(self, value: Any, known: Sequence[str], required: Sequence[str] = ()) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.fail(f"this must be a mapping with the keys {', '.join(known)}, not {_shown(value)}")
        for key in value:
            if key not in known:
                self.fail(f"unknown key {key!r}.{nearest(str(key), known)} Keys are: {', '.join(known)}", key)
        for key in required:
            if value.get(key) is None:
                self.fail(f"the key {key!r} is missing")
        return value

    def choice(self, value: Any, known: Sequence[str], key: str) -> Any:
        if value not in known:
            hint = nearest(value, known) if isinstance(value, str) else ""
            self.fail(f"{_shown(value)} is not a {key}.{hint} Choose from: {', '.join(known)}", key)
        return value

    def text(self, value: Any, key: str) -> str | None:
        if value is not None and (not isinstance(value, str) or not value):
            self.fail(f"{key} must be text, not {_shown(value)}", key)
        return value

    def pattern(self, value: Any, key: str | int) -> str:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # the leaf names of nn.Sequential, which YAML reads as numbers
        if not isinstance(value, str) or not value:
            self.fail(f"a pattern must be text, not {_shown(value)}: put it in quotes", key)
        if value.startswith("re:"):
            try:
                re.compile(value[3:])
            except re.error as error:
                self.fail(f"pattern {value!r} is not a regular expression: {error}", key)
        return value

    def items(self, value: Any, key: str) -> list[Any]:
        if value is None:
            return []
        if not isinstance(value, list | tuple):
            self.fail(f"{key} must be a list, not {_shown(value)}", key)
        return list(value)


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {value!r}" if not isinstance(value, str) else repr(value)


_KEYS = ("method", "exclude", "rules", "when", "weights", "kernel", "non_finite", "budget", "save")


def _parse(content: Any, origin: Origin) -> QuantizationSpec:
    reader = _Reader(origin)
    given = reader.mapping({} if content is None else content, _KEYS)
    exclude = reader.below("exclude")
    return QuantizationSpec(
        method=reader.choice(given.get("method", "w8a32"), METHOD_NAMES, "method"),
        exclude=tuple(exclude.pattern(p, i) for i, p in enumerate(reader.items(given.get("exclude"), "exclude"))),
        rules=tuple(
            _parse_rule(rule, reader.below("rules", i))
            for i, rule in enumerate(reader.items(given.get("rules"), "rules"))
        ),
        when=reader.choice(given.get("when", "fit_end"), ("fit_end", "test_start"), "when"),
        weights=reader.choice(given.get("weights", "best"), ("best", "last", "current"), "weights"),
        kernel=reader.choice(given.get("kernel", "auto"), KERNELS, "kernel"),
        non_finite=reader.choice(given.get("non_finite", "error"), ("error", "float"), "non_finite"),
        budget=_parse_budget(given.get("budget"), reader.below("budget")),
        save=_parse_save(given.get("save"), reader.below("save")),
        origin=origin,
    )


def _parse_rule(value: Any, reader: _Reader) -> Rule:
    given = reader.mapping(value, ("match", "method", "reason"), required=("match", "method"))
    return Rule(
        reader.pattern(given["match"], "match"),
        reader.choice(given["method"], METHOD_NAMES, "method"),
        reader.text(given.get("reason"), "reason"),
    )


def _parse_save(value: Any, reader: _Reader) -> Save:
    given = reader.mapping({} if value is None else value, ("dirpath", "filename"))
    save = Save(reader.text(given.get("dirpath"), "dirpath"), reader.text(given.get("filename"), "filename"))
    name = save.filename or ""
    if "/" in name or "\\" in name:
        reader.fail(f"filename {name!r} must be a name without folders: use dirpath for those", "filename")
    if re.match(r"last(-v?\d+)?(\.|-|$)", name):
        reader.fail(f"filename {name!r} is one that ckpt_path='last' would pick up: begin it otherwise", "filename")
    return save


def _parse_budget(value: Any, reader: _Reader) -> Budget | None:
    if value is None:
        return None
    given = reader.mapping(value, ("monitor", "mode", "max_drop"), required=("monitor", "mode", "max_drop"))
    drop = given["max_drop"]
    number = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*%\s*", drop) if isinstance(drop, str) else None
    if not number and (isinstance(drop, bool) or not isinstance(drop, int | float) or not drop >= 0):
        reader.fail(f"max_drop must be a number of at least 0 or a share such as '1%', not {_shown(drop)}", "max_drop")
    monitor = reader.text(given["monitor"], "monitor")
    return Budget(cast(str, monitor), reader.choice(given["mode"], ("min", "max"), "mode"), drop)
