"""Checks that the content of a file has the form of a quantized checkpoint, entry by entry."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tinyq_lightning.errors import CheckpointError
from tinyq_lightning.file.codes import CODES, why_malformed
from tinyq_lightning.file.plain import VERSION_TYPES
from tinyq_lightning.methods import KERNELS, METHODS
from tinyq_lightning.plan import users_path
from tinyq_lightning.spec import METHOD_NAMES
from tinyq_lightning.version import __version__

__all__ = [
    "FORMAT_VERSION",
    "TRAINING_KEYS",
    "apart_from_weights",
    "check_format",
    "check_layers",
    "find_codes",
    "format_of",
    "is_quantized",
    "prefixes_of_codes",
    "without_training_entries",
]

FORMAT_VERSION = 2
"""The newest of the ``tinyq`` block, of files with codes of four bits. A newer one is refused, every older one read."""

_FORMAT_OF_BITS = {8: 1, 4: 2}

HYPER_PARAMETERS = "hyper_parameters"
HYPER_PARAMETERS_NAME = "hparams_name"
HYPER_PARAMETERS_TYPE = "hparams_type"
LIGHTNING_VERSION = "pytorch-lightning_version"
"""Entries of a Lightning checkpoint. Not read from LightningModule, because reading a file must not need Lightning."""

TRAINING_KEYS = {
    "callbacks",
    "optimizer_states",
    "lr_schedulers",
    "loops",
    "current_model_state",
    "averaging_state",
    "MixedPrecision",
    "native_amp_scaling_state",
}
"""What a float checkpoint holds for going on with the training, which an int8 model cannot do."""

_LARGEST = 10**7
"""Values in an entry of ``tinyq``; a small file can refer to the same container very often."""

_NOTE_KINDS = {
    "enum": True,
    "namespace": None,
    "mapping": True,
    "namedtuple": True,
    "sequence": True,
    "omegaconf": False,
    "AttributeDict": False,
    "path": False,
    "defaultdict": False,
    "OrderedDict": False,
    "Counter": False,
    "frozenset": False,
    "Size": False,
    "tensor": False,
}
"""Kinds of notes; True if the note names a class, None if it may."""


def format_of(methods: Iterable[str]) -> int:
    """The format version of a file whose layers have these methods: the first that has such codes."""
    return max((_FORMAT_OF_BITS[METHODS[method].bits] for method in methods if method != "float"), default=1)


def without_training_entries(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint without optimizer states, loops and the like."""
    return {key: value for key, value in checkpoint.items() if key not in TRAINING_KEYS}


def apart_from_weights(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint without what :func:`without_training_entries` leaves out, and without its state dict."""
    return {key: value for key, value in without_training_entries(checkpoint).items() if key != "state_dict"}


def is_quantized(checkpoint: Any) -> bool:
    """True if a loaded checkpoint is a quantized one."""
    return isinstance(checkpoint, Mapping) and isinstance(checkpoint.get("tinyq"), Mapping)


def check_format(content: Any, path: str | os.PathLike[str]) -> None:
    """Check all entries that this package reads, but for the tensors.

    Raises:
        CheckpointError: the content is not a quantized checkpoint, is of a newer format, or has a malformed entry.
    """
    if not is_quantized(content):
        lightning_made = isinstance(content, Mapping) and LIGHTNING_VERSION in content
        if not lightning_made:
            raise CheckpointError(f"{path}: this is no Lightning checkpoint, not a quantized one")
        raise CheckpointError(
            f"{path}: this is a float Lightning checkpoint, not a quantized one. Quantize it first: "
            f"tinyq-lightning quantize {path} --model package.module:Class"
        )
    found = content["tinyq"].get("format_version")
    if type(found) is int and found > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {found!r} is newer than {FORMAT_VERSION}, the newest that tinyq_lightning "
            f"{__version__} reads: upgrade it"
        )
    wrong = [f"tinyq.{key}" for key, value in content["tinyq"].items() if _size(value, 0, {}) > _LARGEST]
    wrong = wrong or list(_malformed(content))
    if wrong:
        raise CheckpointError(f"{path}: the file is damaged: no such entry, or a malformed one: {', '.join(wrong)}")


def _malformed(content: Mapping[str, Any]) -> Iterator[str]:
    """Names of the entries that are missing or malformed."""
    tinyq = content["tinyq"]
    checks: dict[str, Callable[[Any], bool]] = {
        "format_version": lambda value: type(value) is int and value >= 1,
        "label": _is_text,
        "spec": lambda value: _is_dict_of(value, _is_anything) and value.get("kernel", "auto") in KERNELS,
        "metrics": lambda value: _is_dict_of(value, lambda each: _is_dict_of(each, _is_number)),
        "digests": lambda value: _is_dict_of(value, _is_text),
        "versions": lambda value: _is_dict_of(value, _is_text),
        "plan": lambda value: isinstance(value, list),
        "float_sha256": _is_text_or_none,
        "metrics_from": _is_text_or_none,
        "dropped": lambda value: isinstance(value, list) and all(map(_is_text, value)),
        "configs": lambda value: _is_dict_of(value, lambda kind: kind in ("omegaconf", "namespace")),
        "types": lambda value: isinstance(value, list) and all(map(_is_note, value)),
    }
    later = ("metrics_from", "dropped", "configs", "types")  # not in every file of version 1
    for name, good in checks.items():
        if (name in tinyq or name not in later) and not (name in tinyq and good(tinyq[name])):
            yield f"tinyq.{name}"
    for i, decision in enumerate(tinyq["plan"] if isinstance(tinyq.get("plan"), list) else ()):
        if not _is_decision(decision):
            yield f"tinyq.plan[{i}]"
    state = content.get("state_dict")
    if not _is_dict_of(state, _is_anything):
        yield "state_dict"
    if not _is_dict_of(getattr(state, "_metadata", None) or {}, _is_metadata):
        yield "the version numbers of state_dict"
    if not _is_dict_of(content.get(HYPER_PARAMETERS, {}), _is_anything):
        yield HYPER_PARAMETERS
    for name in (HYPER_PARAMETERS_NAME, HYPER_PARAMETERS_TYPE):
        if not _is_text_or_none(content.get(name)):
            yield name


def _size(value: Any, depth: int, done: dict[int, float]) -> float:
    """How many values there are if each container is written out; infinite if one contains itself or is very deep."""
    if not isinstance(value, dict | list | tuple):
        return 1
    if id(value) not in done:
        done[id(value)] = math.inf  # until it is known: a container that holds itself meets this
        items = value.values() if isinstance(value, dict) else value
        done[id(value)] = math.inf if depth > 50 else 1 + sum(_size(item, depth + 1, done) for item in items)
    return done[id(value)]


def _is_anything(value: Any) -> bool:
    return True


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_text_or_none(value: Any) -> bool:
    return value is None or _is_text(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_dict_of(value: Any, good: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(_is_text(key) and good(item) for key, item in value.items())


def _is_metadata(value: Any) -> bool:
    return _is_dict_of(value, _is_anything) and type(value.get("version")) in VERSION_TYPES


def _is_decision(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_text(value.get("name")):
        return False
    method, decibels = value.get("method"), value.get("weight_sqnr_db", math.nan)
    aliases = value.get("aliases", ())
    return (
        _is_text(method)
        and method in METHOD_NAMES
        and _is_text(value.get("reason"))
        and (decibels is None or (_is_number(decibels) and not math.isnan(decibels)))
        and all(type(value.get(key)) is int and value[key] >= 0 for key in ("float_bytes", "bytes"))
        and isinstance(aliases, list | tuple)
        and all(map(_is_text, aliases))
        and _is_text_or_none(value.get("tied_to"))
        and _is_text(value.get("kind", ""))
        and _is_text_or_none(value.get("asked"))
        and _is_text_or_none(value.get("uncalibrated"))
        and (value.get("output_error") is None or _is_number(value["output_error"]))
    )


def _is_note(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("path"), list) or not _is_text(value.get("kind")):
        return False
    names_class = _NOTE_KINDS.get(value["kind"], False)
    keys = all(type(key) in (str, int, float, bool, type(None)) for key in value["path"])
    has_class = _is_text(value.get("class")) if names_class or "class" in value else True
    return (
        keys
        and value["kind"] in _NOTE_KINDS
        and has_class
        and ("class" not in value or names_class is not False)
        and _is_text_or_none(value.get("name"))
    )


def prefixes_of_codes(state_dict: Mapping[str, Any]) -> list[str]:
    """The prefixes, such as ``encoder.linear.``, below which a state dict has ``int8_weights`` or ``int4_weights``."""
    return [
        key.removesuffix(codes) for key in state_dict for codes in CODES.values() if f".{key}".endswith(f".{codes}")
    ]


def find_codes(prefixes: Sequence[str], names: Sequence[str]) -> list[str]:
    """Which of ``prefixes`` are those of one layer.

    Args:
        prefixes: of :func:`prefixes_of_codes`.
        names: of the layer.

    Returns:
        The prefixes that are a name of the layer. If there are none, those that begin with a name of the layer. If
        there are none of these either, the prefix that is a name without its first parts or with further ones before
        it, because ``state_dict()`` of a class may change them; nothing if several prefixes are.
    """
    plain = {users_path(prefix): prefix for prefix in prefixes}  # a plan has no names of wrappers
    exact = [plain[f"{name}."] for name in names if f"{name}." in plain]
    within = exact or [plain[prefix] for prefix in plain if any(prefix.startswith(f"{name}.") for name in names)]
    if within:
        return within
    ends = [f".{name}." for name in names]
    near = [prefix for prefix in prefixes if any(e.endswith(f".{prefix}") or f".{prefix}".endswith(e) for e in ends)]
    return near if len(near) == 1 else []


def check_layers(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Check that each layer that the plan has as quantized has codes and scales, of the right form.

    Raises:
        CheckpointError: a layer has none, or malformed ones.
    """
    state, plan = content["state_dict"], content["tinyq"]["plan"]
    prefixes = prefixes_of_codes(state)
    names = {entry["name"]: [entry["name"], *entry.get("aliases", ())] for entry in plan}
    for entry in plan:
        if entry["method"] == "float":
            continue
        found = find_codes(prefixes, names[entry["name"]]) or find_codes(prefixes, names.get(entry.get("tied_to"), []))
        if not found:
            raise CheckpointError(
                f"{path}: the state dict has no codes of the layer {entry['name']!r}, which the plan has as "
                f"{entry['method']}: let state_dict() of the module keep them, or exclude the layer in the spec"
            )
        for prefix in found:
            if wrong := why_malformed(state, prefix, METHODS[entry["method"]].bits):
                raise CheckpointError(f"{path}: the file is damaged: layer {entry['name']!r}: state_dict.{wrong}")
