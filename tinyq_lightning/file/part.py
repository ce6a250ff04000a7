"""The content of a quantized checkpoint for one attribute of the model, as if it alone had been quantized."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from tinyq_lightning.errors import CheckpointError

__all__ = [
    "content_of_part",
]


def content_of_part(content: Mapping[str, Any], part: str, source: str) -> dict[str, Any]:
    """The tensors and the decisions below an attribute, without its name.

    A tie to a layer outside of the part is none any more: the part has the codes itself.

    Args:
        content: of a checked quantized checkpoint.
        part: dotted path of the attribute.
        source: the file's name, for the error.

    Raises:
        CheckpointError: the model has no such attribute with tensors, or it is a quantized layer itself.
    """
    prefix = f"{part}."
    state = content["state_dict"]
    for entry in content["tinyq"]["plan"]:
        if part in (entry["name"], *entry.get("aliases", ())) and entry["method"] != "float":
            above = part.rpartition(".")[0]
            advice = f"part={above!r} loads the module that holds it" if above else "load the whole model without part"
            raise CheckpointError(
                f"{source}: the part {part!r} is a single quantized layer ({entry['method']}), and layers are put into "
                f"the module that holds them: {advice}"
            )
    kept: OrderedDict[str, Any] = OrderedDict(
        (name.removeprefix(prefix), value) for name, value in state.items() if name.startswith(prefix)
    )
    if not kept:
        tops = ", ".join(dict.fromkeys(name.partition(".")[0] for name in state))
        raise CheckpointError(f"{source}: the model has no part {part!r} with tensors. Its parts are: {tops}")
    versions = getattr(state, "_metadata", None)
    if isinstance(versions, Mapping):
        vars(kept)["_metadata"] = OrderedDict(
            (name.removeprefix(part).removeprefix("."), each)
            for name, each in versions.items()
            if name == part or name.startswith(prefix)
        )
    plan = [decision for entry in content["tinyq"]["plan"] if (decision := _of_part(entry, prefix)) is not None]
    names = {entry["name"] for entry in plan}
    for entry in plan:
        if entry.get("tied_to") not in names:
            entry["tied_to"] = None
    return {**content, "state_dict": kept, "tinyq": {**content["tinyq"], "plan": plan}}


def _of_part(entry: Mapping[str, Any], prefix: str) -> dict[str, Any] | None:
    """A layer's decision by the names that it has below the prefix; None if it has none."""
    names = [name for name in (entry["name"], *entry.get("aliases", ())) if name.startswith(prefix)]
    if not names:
        return None
    first, *aliases = (name.removeprefix(prefix) for name in names)
    tied_to = entry.get("tied_to")
    tied = tied_to.removeprefix(prefix) if tied_to is not None and tied_to.startswith(prefix) else None
    return {**entry, "name": first, "aliases": aliases, "tied_to": tied}
