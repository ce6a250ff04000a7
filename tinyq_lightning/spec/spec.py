"""What the user asks for: YAML, mapping or arguments, read into a frozen ``QuantizationSpec`` and checked there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tinyq_lightning.errors import SpecError
from tinyq_lightning.methods import KIND_NAMES, METHODS, KernelName
from tinyq_lightning.spec.checks import (
    Keep,
    NonFinite,
    Weights,
    When,
    check_budget,
    check_calibrate,
    check_choices,
    check_export,
    check_kinds,
    check_methods,
    check_on_ladder,
    check_rule,
    check_save,
)
from tinyq_lightning.spec.parts import MEASURED_BY, Budget, Calibrate, Export, Rule, RuleBy, Save
from tinyq_lightning.spec.places import Origin, apply_override, key_path, read_yaml
from tinyq_lightning.spec.reader import Reader, shown

__all__ = [
    "SPEC_KEYS",
    "Budget",
    "Export",
    "QuantizationSpec",
    "Rule",
    "Save",
    "SpecLike",
    "SpecOrMethods",
    "as_spec",
    "parse_budget",
    "parse_calibrate",
]


@dataclass(frozen=True)
class QuantizationSpec:
    """A method for every layer of the kinds that it names, exclusions, rules, and what happens when.

    Attributes:
        method: for every layer that nothing below names: ``w8a32``, ``w8a16``, ``w8a8``, ``w4a32``, ``w4a16``, ``w4a8``
            or ``float``.
        kinds: the kinds of layer to quantize, of ``methods.KIND_NAMES``. A layer of another kind that shares its
            weight with one of these is quantized along with it; all others stay float.
        exclude: patterns of layers that are never quantized.
        rules: the first one that matches decides; ``exclude`` wins over all.
        when: ``fit_end`` or ``test_start``.
        weights: which float weights: ``best``, ``last`` or ``current``.
        kernel: ``auto`` is the fastest here, ``compact`` the fastest of those that hold no float copy, ``int8`` has the
            same bits for any batch and thread count, ``reference`` is the textbook formula.
        non_finite: ``error`` refuses a layer with NaN or infinite weights, ``float`` leaves it alone.
        budget: how much a metric may lose, or None.
        save: where the file goes.
        methods: where a run is to compare several methods, all of them, ``method`` the first; else empty.
        keep: which of several methods' files are written: ``all``, or with a budget the ``smallest``.
        export: what a run is to export each quantized model in; names of ``methods.FORMAT_NAMES`` are read as such.
        never_slower: whether a run is to time the layers, and to leave float those that are slower quantized.
        calibrate: on how many batches codes of four bits are to be chosen, or None.
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
    kinds: tuple[str, ...] = KIND_NAMES
    export: tuple[Export, ...] = ()
    calibrate: Calibrate | None = None
    origin: Origin = field(default_factory=Origin, compare=False, repr=False)

    def __post_init__(self) -> None:
        reader = Reader(self.origin)
        check_methods(self.method, self.methods, reader)
        check_choices(vars(self), reader)
        reader.flag(self.never_slower, "never_slower")
        check_save(self.save, reader.below("save"))
        object.__setattr__(self, "kinds", check_kinds(self.kinds, reader))
        object.__setattr__(self, "export", check_export(self.export, reader))
        patterns = reader.below("exclude")
        exclude = [patterns.pattern(p, i) for i, p in enumerate(reader.items(self.exclude, "exclude"))]
        rules = [check_rule(rule, reader.below("rules", i)) for i, rule in enumerate(reader.items(self.rules, "rules"))]
        object.__setattr__(self, "exclude", tuple(exclude))
        object.__setattr__(self, "rules", tuple(rules))
        if self.methods:
            object.__setattr__(self, "method", self.methods[0])
        object.__setattr__(self, "methods", tuple(self.methods) if len(self.methods) > 1 else ())
        if self.calibrate is not None:
            check_calibrate(self.calibrate, self.has_four_bits, reader.below("calibrate"))
        if self.budget is not None:
            below = reader.below("budget")
            object.__setattr__(self, "budget", check_budget(self.budget, below))
            check_on_ladder(self.budget, self.methods or (self.method,), below)

    @property
    def has_four_bits(self) -> bool:
        """Whether a method that it names has codes of four bits."""
        named = {self.method, *self.methods, *(rule.method for rule in self.rules)}
        return any(method in METHODS and METHODS[method].bits == 4 for method in named)

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
                apply_override(merged, override)
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
            {"match": rule.match, "method": rule.method}
            | ({"reason": rule.reason} if rule.reason else {})
            | ({"decided_by": rule.decided_by} if rule.decided_by in MEASURED_BY else {})
            for rule in self.rules
        ]
        content: dict[str, Any] = {
            "method": list(self.methods) or self.method,
            "kinds": "all" if self.kinds == KIND_NAMES else list(self.kinds),
            "exclude": list(self.exclude),
            "rules": rules,
            "when": self.when,
            "weights": self.weights,
            "kernel": self.kernel,
            "non_finite": self.non_finite,
            "budget": self.budget and self.budget.to_dict(),
            "save": {"dirpath": self.save.dirpath, "filename": self.save.filename},
            "keep": self.keep,
        }
        # only where it is asked for, which a file's spec never does: what was timed is among its rules
        content |= {"export": [each.to_plain() for each in self.export]} if self.export else {}
        content |= {"never_slower": True} if self.never_slower else {}
        return content | ({"calibrate": {"batches": self.calibrate.batches}} if self.calibrate else {})

    def each(self) -> tuple[QuantizationSpec, ...]:
        """One spec for each method asked for, without what is a run's to decide among them, to time and to export."""
        one = replace(self, methods=(), keep="all", never_slower=False, export=(), calibrate=None)
        specs = [replace(one, method=method) for method in self.methods or (self.method,)]
        return tuple(
            replace(each, calibrate=self.calibrate) if self.calibrate and each.has_four_bits else each for each in specs
        )

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The spec as YAML text, also written to ``path`` where one is given."""
        text = OmegaConf.to_yaml(OmegaConf.create(self.to_dict()))
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text


SpecLike = str | Path | Mapping[str, Any] | QuantizationSpec


SpecOrMethods = str | list[str] | Path | Mapping[str, Any] | QuantizationSpec


def as_spec(spec: SpecOrMethods) -> QuantizationSpec:
    """A spec from a method name, several of them, a YAML path, a mapping, or a spec.

    Raises:
        SpecError: a string that is neither a method nor a YAML file, or a spec that is wrong.
    """
    if isinstance(spec, QuantizationSpec):
        return spec
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


SPEC_KEYS = (
    "method",
    "kinds",
    "exclude",
    "rules",
    "when",
    "weights",
    "kernel",
    "non_finite",
    "budget",
    "save",
    "keep",
    "export",
    "never_slower",
    "calibrate",
)


# Earlier versions knew these kinds alone, and wrote all of these keys into a spec that a run had resolved.
_FORMER_KINDS = ("linear", "attention")
_FORMER_KEYS = {"method", "exclude", "rules", "when", "weights", "kernel", "non_finite", "save", "keep"}


def _parse(content: Any, origin: Origin) -> QuantizationSpec:
    """A spec from plain data: its structure is read here, its values are checked as the spec is made."""
    reader = Reader(origin)
    given = dict(reader.mapping({} if content is None else content, SPEC_KEYS))
    if "kinds" not in given and given.keys() >= _FORMER_KEYS:
        given["kinds"] = _FORMER_KINDS
        warnings.warn(
            f"{origin.where()}: a spec with every key but kinds is read as one that a run of an earlier version wrote, "
            f"which knew the kinds {', '.join(_FORMER_KINDS)} alone: layers of other kinds stay float. Write kinds: "
            f"[{', '.join(_FORMER_KINDS)}] to keep that, or kinds: all",
            stacklevel=4,
        )
    budget = parse_budget(given.pop("budget", None), reader.below("budget"))
    lowest = budget.ladder[0] if budget and budget.ladder and budget.ladder[0] in METHODS else "w8a32"
    method, methods = given.pop("method", lowest), ()
    if isinstance(method, list):
        if not method:
            reader.below("method").fail(f"the list of methods is empty. Choose from: {', '.join(METHODS)}")
        method, methods = method[0], tuple(method)
    rules = reader.items(given.pop("rules", None), "rules")
    return QuantizationSpec(
        method,
        rules=tuple(_parse_rule(rule, reader.below("rules", i)) for i, rule in enumerate(rules)),
        budget=budget,
        calibrate=parse_calibrate(given.pop("calibrate", None), reader),
        save=_parse_save(given.pop("save", None), reader.below("save")),
        methods=methods,
        origin=origin,
        **given,
    )


def _parse_rule(value: Any, reader: Reader) -> Rule:
    given = reader.mapping(value, ("match", "method", "reason", "decided_by"), required=("match", "method"))
    reason, decided_by = given.get("reason"), given.get("decided_by")
    if decided_by is None:
        decided_by = _decided_by_reason(reason)
    return Rule(given["match"], given["method"], reason, decided_by)


def _decided_by_reason(reason: Any) -> RuleBy:
    """Who wrote a rule without the key: runs that wrote rules before there was one began their reasons like this."""
    text = reason if isinstance(reason, str) else ""
    if text == "budget" or text.startswith("budget: "):
        return "budget"
    return "timing" if text.startswith("left float: ") else "rule"


def _parse_save(value: Any, reader: Reader) -> Save:
    given = reader.mapping({} if value is None else value, ("dirpath", "filename"))
    return Save(given.get("dirpath"), given.get("filename"))


def parse_budget(value: Any, reader: Reader) -> Budget | None:
    """A budget from plain data; None for none."""
    if value is None:
        return None
    known = ("monitor", "mode", "max_drop", "max_evals", "max_seconds", "ladder")
    given = reader.mapping(value, known, required=("monitor", "max_drop"))
    values: dict[str, Any] = {key: given.get(key) for key in known}
    if values["ladder"] is not None:
        values["ladder"] = tuple(reader.items(values["ladder"], "ladder"))
    return Budget(**values)


def parse_calibrate(value: Any, reader: Reader) -> Calibrate | None:
    """On how much data codes are chosen, from a number of batches or a mapping; None for none.

    Args:
        value: at the key ``calibrate``.
        reader: of the spec.
    """
    if value is None:
        return None
    if isinstance(value, int):
        value = {"batches": value}
    below = reader.below("calibrate")
    given = below.mapping(value, ("batches",), required=("batches",))
    return Calibrate(given["batches"])
