"""What the user asks for: YAML, mapping or arguments, parsed once into a frozen ``QuantizationSpec``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tinyq_lightning.errors import SpecError
from tinyq_lightning.methods import KERNELS, METHODS, KernelName
from tinyq_lightning.spec.places import Origin, key_path, read_yaml
from tinyq_lightning.spec.reader import Reader, nearest, shown

__all__ = [
    "METHOD_NAMES",
    "Budget",
    "QuantizationSpec",
    "Rule",
    "Save",
    "SpecLike",
    "SpecOrMethods",
    "as_spec",
]

When = Literal["fit_end", "test_start"]


Weights = Literal["best", "last", "current"]


NonFinite = Literal["error", "float"]


Mode = Literal["min", "max"]


Keep = Literal["all", "smallest"]


METHOD_NAMES = (*METHODS, "float")
"""What may stand for ``method``; ``float`` leaves a layer alone."""


@dataclass(frozen=True)
class Rule:
    """A pattern and the method of the layers it covers.

    Attributes:
        match: the pattern, see :func:`~tinyq_lightning.spec.matching.pattern_matches`.
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
        mode: ``max`` where more is better, ``min`` where less is; None: what the logged torchmetrics
            object says of itself.
        max_drop: the loss allowed, as a number in the metric's unit or ``"1%"`` of the float value.
        max_evals: validation loops that the search may run, past those of the float model and of the
            plan as asked for; None: as many as the search ever needs.
        max_seconds: time after which the search begins no further validation loop; None: no limit.
    """

    monitor: str
    mode: Mode | None
    max_drop: float | str
    max_evals: int | None = None
    max_seconds: float | None = None

    def allowed(self, float_value: float) -> float:
        """The loss allowed, in the metric's unit."""
        if isinstance(self.max_drop, str):
            return float(self.max_drop.rstrip(" %")) / 100 * abs(float_value)
        return self.max_drop

    def lost(self, float_value: float, value: float) -> float:
        """How much worse ``value`` is than the float model's; negative where it is better."""
        return float_value - value if self.mode == "max" else value - float_value


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
        methods: where a run is to compare several methods, all of them, ``method`` the first; else empty.
        keep: which of several methods' files are written: ``all``, or with a budget the ``smallest``.
        never_slower: whether a run is to time the layers, and to leave float those that int8 makes slower.
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
    methods: tuple[str, ...] = ()
    keep: Keep = "all"
    never_slower: bool = False
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
            raise SpecError(f"a spec must be a mapping, for example {{'method': 'w8a32'}}, not {shown(d)}")
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
        content = {
            "method": list(self.methods) or self.method,
            "exclude": list(self.exclude),
            "rules": rules,
            "when": self.when,
            "weights": self.weights,
            "kernel": self.kernel,
            "non_finite": self.non_finite,
            "budget": self.budget and asdict(self.budget),
            "save": {"dirpath": self.save.dirpath, "filename": self.save.filename},
            "keep": self.keep,
        }
        # only where it is asked for, which a file's spec never does: what was timed is among its rules
        return content | ({"never_slower": True} if self.never_slower else {})

    def each(self) -> tuple[QuantizationSpec, ...]:
        """One spec for each method asked for, without what is a run's to decide among them and from timings."""
        one = replace(self, methods=(), keep="all", never_slower=False)
        return tuple(replace(one, method=method) for method in self.methods or (self.method,))

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


SpecOrMethods = str | list[str] | Path | Mapping[str, Any] | QuantizationSpec


def as_spec(spec: SpecOrMethods) -> QuantizationSpec:
    """A spec from a method name, several of them, a YAML path, a mapping, or a spec.

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
    if isinstance(spec, list | tuple) or OmegaConf.is_list(spec):
        return QuantizationSpec.from_dict({"method": list(spec)})
    raise SpecError(
        f"a spec is a method name, a path to YAML, a mapping or a QuantizationSpec, not {type(spec).__name__}"
    )


_KEYS = (
    "method",
    "exclude",
    "rules",
    "when",
    "weights",
    "kernel",
    "non_finite",
    "budget",
    "save",
    "keep",
    "never_slower",
)


def _parse(content: Any, origin: Origin) -> QuantizationSpec:
    reader = Reader(origin)
    given = reader.mapping({} if content is None else content, _KEYS)
    exclude = reader.below("exclude")
    method, methods = _parse_method(given.get("method", "w8a32"), reader)
    return QuantizationSpec(
        method=method,
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
        methods=methods,
        keep=reader.choice(given.get("keep", "all"), ("all", "smallest"), "keep"),
        never_slower=reader.flag(given.get("never_slower", False), "never_slower"),
        origin=origin,
    )


def _parse_method(value: Any, reader: Reader) -> tuple[str, tuple[str, ...]]:
    """The method, or the first of a list and all of it."""
    if not isinstance(value, list):
        return reader.choice(value, METHOD_NAMES, "method"), ()
    below = reader.below("method")
    for index, method in enumerate(value):
        if method not in METHODS:
            hint = nearest(method, METHODS) if isinstance(method, str) else ""
            why = " The float model is measured in any case." if method == "float" else hint
            below.fail(f"{shown(method)} cannot be compared.{why} Choose from: {', '.join(METHODS)}", index)
        if method in value[:index]:
            below.fail(f"{method!r} is in the list twice", index)
    if not value:
        below.fail(f"the list of methods is empty. Choose from: {', '.join(METHODS)}")
    return value[0], tuple(value) if len(value) > 1 else ()


def _parse_rule(value: Any, reader: Reader) -> Rule:
    given = reader.mapping(value, ("match", "method", "reason"), required=("match", "method"))
    return Rule(
        reader.pattern(given["match"], "match"),
        reader.choice(given["method"], METHOD_NAMES, "method"),
        reader.text(given.get("reason"), "reason"),
    )


def _parse_save(value: Any, reader: Reader) -> Save:
    given = reader.mapping({} if value is None else value, ("dirpath", "filename"))
    save = Save(reader.text(given.get("dirpath"), "dirpath"), reader.text(given.get("filename"), "filename"))
    name = save.filename or ""
    if "/" in name or "\\" in name:
        reader.fail(f"filename {name!r} must be a name without folders: use dirpath for those", "filename")
    if re.match(r"last(-v?\d+)?(\.|-|$)", name):
        reader.fail(f"filename {name!r} is one that ckpt_path='last' would pick up: begin it otherwise", "filename")
    if "{" in name:
        reader.fail(f"filename {name!r} is taken as it is: nothing is put in for braces", "filename")
    return save


def _parse_budget(value: Any, reader: Reader) -> Budget | None:
    if value is None:
        return None
    known = ("monitor", "mode", "max_drop", "max_evals", "max_seconds")
    given = reader.mapping(value, known, required=("monitor", "max_drop"))
    mode, evals, seconds = (given.get(key) for key in ("mode", "max_evals", "max_seconds"))
    drop: Any = given["max_drop"]
    share = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*%\s*", drop) if isinstance(drop, str) else None
    if not share and not _is_number(drop):
        reader.fail(f"max_drop must be a number of at least 0 or a share such as '1%', not {shown(drop)}", "max_drop")
    if evals is not None and not (isinstance(evals, int) and not isinstance(evals, bool) and evals >= 1):
        reader.fail(f"max_evals must be a whole number of at least 1, not {shown(evals)}", "max_evals")
    if seconds is not None and not (_is_number(seconds) and seconds > 0):
        reader.fail(f"max_seconds must be a number above 0, not {shown(seconds)}", "max_seconds")
    if mode is not None:
        reader.choice(mode, ("min", "max"), "mode")
    monitor = cast(str, reader.text(given["monitor"], "monitor"))
    return Budget(monitor, mode, drop.strip() if isinstance(drop, str) else drop, evals, seconds)


def _is_number(value: Any) -> bool:
    """Finite and not negative."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
