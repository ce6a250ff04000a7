"""Where each key of a spec was written: file and line, or the override, for errors that point at it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tinyq_lightning.errors import SpecError

__all__ = [
    "Origin",
    "apply_override",
    "key_path",
    "read_yaml",
]

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Origin:
    """A place (``spec.yaml:3``) for every key path that has one.

    Attributes:
        places: by key path.
        has_kinds: whether whoever wrote the spec can give ``kinds``; the tutorial's functions cannot.
    """

    places: Mapping[KeyPath, str] = field(default_factory=dict)
    has_kinds: bool = True

    def over(self, places: Mapping[KeyPath, str]) -> Origin:
        """This one with ``places`` added; they win."""
        return replace(self, places={**self.places, **places})

    def replaced(self, path: KeyPath, place: str) -> Origin:
        """This one with ``path``, and all that was below it, written at ``place``."""
        kept = {known: at for known, at in self.places.items() if known[: len(path)] != path}
        return replace(self, places={**kept, path: place})

    def explain(self, error: OmegaConfBaseException) -> str:
        """OmegaConf's error in one line, with the place of the key it is about."""
        return f"{self.where(*key_path(error.full_key or ''))}: {str(error.msg or error).splitlines()[0]}"

    def where(self, *path: str | int) -> str:
        """``spec.yaml:3 (rules.0.method)``: the nearest place known for the path, and the path itself."""
        dotted = ".".join(map(str, path)) or "spec"
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return f"{self.places[path[:length]]} ({dotted})" if path else self.places[()]
        return dotted if not path else f"spec ({dotted})"


def read_yaml(path: str | Path) -> tuple[DictConfig, dict[KeyPath, str]]:
    """A YAML file as an OmegaConf mapping, and the line of each of its keys.

    Raises:
        SpecError: no such file, not YAML, or not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(f"{path}: the spec cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: the spec is not UTF-8 text") from error
    places: dict[KeyPath, str] = {(): str(path)}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            warnings.warn(
                f"TinyQ: {path}: the file is empty, so it leaves all at the default, method: w8a32", stacklevel=3
            )
            return OmegaConf.create({}), places
        _collect(node, (), str(path), places)
        config = OmegaConf.create(text)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SpecError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except OmegaConfBaseException as error:
        raise SpecError(Origin(places).explain(error)) from error
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(config, DictConfig) or not isinstance(node, yaml.MappingNode):
        raise SpecError(f"{path}:1: a spec is a mapping, for example 'method: w8a32'")
    return config, places


def apply_override(config: Any, override: str) -> None:
    """Set one key of ``config`` as ``override`` (``key=value``) says.

    Raises:
        SpecError: it is not of that form, or there is no such place.
    """
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


def key_path(key: str) -> KeyPath:
    """``rules.0.method`` or ``rules[0].method`` as a path."""
    return tuple(int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", key))


def _collect(node: yaml.Node, path: KeyPath, file: str, places: dict[KeyPath, str]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = (*path, key.value)
            places[below] = f"{file}:{key.start_mark.line + 1}"
            _collect(value, below, file, places)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            below = (*path, index)
            places[below] = f"{file}:{value.start_mark.line + 1}"
            _collect(value, below, file, places)
