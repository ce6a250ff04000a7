"""The two packages that Lightning comes in, and which of them an object is of.

``lightning.pytorch`` and ``pytorch_lightning`` hold the same classes twice. A Trainer takes modules, data modules and
callbacks of its own package only, so what runs beside one is made from the classes of that package.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Hashable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

from tinyq_lightning.errors import TrainerError

__all__ = [
    "NAMESPACES",
    "OF_LIGHTNING",
    "Namespace",
    "derives_from",
    "is_lightnings",
    "is_overridden",
    "namespace_of",
    "of_both",
    "refuse_other_namespace",
    "take_imported",
]


@dataclass(frozen=True)
class Namespace:
    """One of the packages.

    Attributes:
        name: what users import from.
        fabric_name: the package of Lightning Fabric that belongs to it.
    """

    name: str
    fabric_name: str

    @property
    def pytorch(self) -> Any:
        """The package, imported."""
        return importlib.import_module(self.name)

    @property
    def is_imported(self) -> bool:
        """Whether it is imported already, to its end."""
        return hasattr(sys.modules.get(self.name), "Trainer")

    def module(self, name: str) -> Any:
        """The module ``name`` of the package, such as ``trainer.call``, imported."""
        return importlib.import_module(f"{self.name}.{name}")

    def derived(self, mixin: type) -> Any:
        """``mixin`` in front of the class of this package that ``mixin.derives`` names, such as ``loggers.Logger``."""
        return _derived(self, cast(Hashable, mixin))

    def has(self, kind: type) -> bool:
        """Whether a class is defined in the package or in its Fabric."""
        return f"{kind.__module__}.".startswith((f"{self.name}.", f"{self.fabric_name}."))


NAMESPACES = (Namespace("lightning.pytorch", "lightning.fabric"), Namespace("pytorch_lightning", "lightning_fabric"))


OF_LIGHTNING = r"(pytorch_)?lightning(_fabric)?\."
"""What the names of their modules begin with, as a regular expression: for filters of warnings, such as its advice."""


@functools.cache
def _derived(namespace: Namespace, mixin: Any) -> type:
    base = attrgetter(mixin.derives)(namespace.pytorch)
    return type(mixin.__name__, (mixin, base), {"__module__": mixin.__module__, "__doc__": mixin.__doc__})


def namespace_of(value: object) -> Namespace:
    """The package that a Trainer, a module or another object of Lightning is of, or that a class derives from.

    Raises:
        TrainerError: it is of neither.
    """
    if (found := _namespace(_class_of(value))) is None:
        names = " nor ".join(each.name for each in NAMESPACES)
        raise TrainerError(f"{_class_of(value).__qualname__} is of neither {names}")
    return found


def _class_of(value: object) -> type:
    return value if isinstance(value, type) else type(value)


def _namespace(kind: type) -> Namespace | None:
    """The first package in the order of the bases; None if no base is of either."""
    return next((each for base in kind.__mro__ for each in NAMESPACES if each.has(base)), None)


def is_overridden(name: str, module: object) -> bool:
    """Whether a module has a hook or a step of its own, as Lightning tells."""
    return bool(namespace_of(module).module("utilities.model_helpers").is_overridden(name, module))


def derives_from(kind: type, *names: str) -> bool:
    """Whether a class is, or derives from, a class of Lightning with one of these names; nothing is imported."""
    return any(is_lightnings(base, *names) for base in kind.__mro__)


def is_lightnings(kind: type, *names: str) -> bool:
    """Whether a class is Lightning's own class with one of these names; nothing is imported."""
    return kind.__name__ in names and any(each.has(kind) for each in NAMESPACES)


def refuse_other_namespace(owner: object, *others: object) -> None:
    """Refuse objects of the other package than that of ``owner``, or classes of it; of no package or of both may be.

    Args:
        owner: a Trainer, or a module that a Trainer is made for.
        others: what it is to run with.

    Raises:
        TrainerError: an object is of the other package; the error says what to import instead.
    """
    wanted = namespace_of(owner)
    for other in others:
        kind = _class_of(other)
        lightnings = [(base, each) for base in kind.__mro__ for each in NAMESPACES if each.has(base)]
        if lightnings and wanted not in (each for _, each in lightnings):
            base, found = lightnings[0]
            raise TrainerError(
                f"{_class_of(owner).__name__} is of {wanted.name} and {kind.__name__} of {found.name}, and these two "
                f"packages cannot be mixed: write `from {_place(found, wanted, base)} import {base.__name__}`"
                + ("" if kind is base else f" where {kind.__name__} is defined")
                + f", or import all else from {found.name}"
            )


def _place(found: Namespace, wanted: Namespace, base: type) -> str:
    """Where the counterpart in ``wanted`` of the class ``base`` of ``found`` is imported from."""
    if hasattr(wanted.pytorch, base.__name__):
        return wanted.name
    return f"{wanted.name}.{base.__module__.removeprefix(found.name).split('.')[1]}"


def of_both(name: str) -> Any:
    """A new class that derives from Lightning's class ``name``, of each package that is imported, now or later.

    A package that is imported later is added when an instance is made, or by :func:`take_imported`. The other one is
    not imported for this: each would take over the log of both.

    Args:
        name: such as ``Callback`` or ``callbacks.ModelSummary``.

    Raises:
        ImportError: neither is installed.
    """

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        take_imported()
        return object.__new__(cls)

    told = f"Lightning's ``{name}``, of each package that is imported."
    names = {"__module__": __name__, "__doc__": told, "__new__": new}
    kind = type(f"{name.rpartition('.')[2]}OfBoth", (_NoBase,), names)
    _OF_BOTH[kind] = name
    take_imported()
    return kind


class _NoBase:
    """Stands for a base until there is one: Python exchanges the bases of a class only if these are not ``object``."""


_OF_BOTH: dict[type, str] = {}


def take_imported() -> None:
    """Have the classes made by :func:`of_both` derive from all packages that are imported by now.

    Raises:
        ImportError: neither is installed.
    """
    imported = [each for each in NAMESPACES if each.is_imported] or [_installed()]
    for kind, name in _OF_BOTH.items():
        bases = tuple(attrgetter(name)(each.pytorch) for each in imported)
        if kind.__bases__ != bases:
            kind.__bases__ = bases


def _installed() -> Namespace:
    """The first package that is installed."""
    for each in NAMESPACES:
        if importlib.util.find_spec(each.name.partition(".")[0]) is not None:
            return each
    raise ImportError("this needs Lightning: pip install lightning, or pip install pytorch-lightning")
