"""The rooms: imports go one way, Lightning stays out until it is wanted, and what is public is documented."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tinyq_lightning

NAME = "tinyq_lightning"
ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / NAME


def rooms_in_order():
    """The modules of CONTRIBUTING.md's table, in its order; a folder stands for all that is in it."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = re.search(r"^\| module \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    first_cells = [row.split("|")[1] for row in table[1].splitlines()]
    listed = [name for cell in first_cells for name in re.findall(r"`([\w./]+)`", cell)]
    return [name.removesuffix(".py").strip("/").replace("/", ".") for name in listed]


ROOMS = rooms_in_order()


def modules():
    """Dotted path below the package → file, of every module but ``__init__`` of the package itself."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        dotted = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if dotted:
            found[dotted] = file
    return found


MODULES = modules()


def room_of(module):
    """The table's entry for a module: itself, or the nearest folder above it that is listed."""
    parts = module.split(".")
    return next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in ROOMS), None)


def imports_of(module):
    """What a module imports anywhere in it, the late and the type-checking imports too, as absolute names."""
    file = MODULES[module]
    package = [NAME, *module.split(".")]
    package = package if file.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner.removeprefix(NAME + ".") in MODULES else base


def test_the_table_lists_every_module_once_and_nothing_else():
    assert len(ROOMS) == len(set(ROOMS))
    assert [module for module in MODULES if room_of(module) is None] == []
    assert [room for room in ROOMS if room not in MODULES] == []


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_rooms_above_it(module):
    own = room_of(module)
    for imported in imports_of(module):
        top, _, below = imported.partition(".")
        if top != NAME:
            continue
        assert below, f"{module} imports the package itself, and with it every room"
        room = room_of(below)
        allowed = room == own or (room is not None and own is not None and ROOMS.index(room) < ROOMS.index(own))
        assert allowed, f"{module} imports {below}, which is not above it in CONTRIBUTING.md"


@pytest.mark.parametrize("room", ROOMS[: ROOMS.index("replacement") + 1])
def test_everything_down_to_replacement_knows_nothing_of_lightning(room):
    for module in MODULES:
        if room_of(module) == room:
            tops = {imported.split(".")[0] for imported in imports_of(module)}
            assert not tops & {
                "lightning",
                "pytorch_lightning",
                "lightning_utilities",
                "lightning_fabric",
                "torchmetrics",
            }


WITHOUT_LIGHTNING = """
import sys
import torch
import tinyq_lightning as tinyq

def loaded():
    return sorted(m for m in sys.modules if m.split(".")[0] in ("lightning", "pytorch_lightning", "lightning_fabric"))

assert not loaded(), loaded()
dir(tinyq)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
with tinyq.quantized(model, tinyq.QuantizationSpec.from_dict({"exclude": ["1"]})) as plan:
    model(torch.ones(1, 4))
    plan.table()
tinyq.Quantizer(model).quantize()
assert not loaded(), loaded()
tinyq.TinyQCallback
assert loaded()
"""


def test_importing_and_quantizing_imports_no_lightning_until_a_lightning_name_is_touched():
    run = subprocess.run([sys.executable, "-c", WITHOUT_LIGHTNING], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_every_public_name_is_importable_and_listed():
    assert len(tinyq_lightning.__all__) == len(set(tinyq_lightning.__all__))
    for name in tinyq_lightning.__all__:
        assert getattr(tinyq_lightning, name) is not None
        assert name in dir(tinyq_lightning)
    star = {}
    exec(f"from {NAME} import *", star)
    assert set(tinyq_lightning.__all__) <= set(star)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="TinyQCalback"):
        tinyq_lightning.TinyQCalback  # noqa: B018


@pytest.mark.parametrize("name", [name for name in tinyq_lightning.__all__ if not name.startswith("__")])
def test_every_public_name_is_documented_with_its_public_methods(name):
    thing = getattr(tinyq_lightning, name)
    assert own_docstring(thing), f"{name} has no docstring of its own"
    if inspect.isclass(thing):
        for attribute, value in vars(thing).items():
            function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            inherited = any(attribute in vars(base) for base in thing.__mro__[1:])
            if (
                attribute.startswith("_")
                or inherited
                or not (inspect.isfunction(function) or isinstance(value, property))
            ):
                continue
            assert function.__doc__, f"{name}.{attribute} has no docstring"


def own_docstring(thing):
    return vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__


@pytest.mark.parametrize("module", MODULES)
def test_every_module_is_documented_and_so_is_what_it_exports(module):
    loaded = importlib.import_module(f"{NAME}.{module}")
    assert loaded.__doc__
    for name in getattr(loaded, "__all__", []):
        thing = getattr(loaded, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert own_docstring(thing), f"{module}.{name} has no docstring of its own"
