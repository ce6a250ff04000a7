"""What is public is there and documented, and Lightning stays out until it is wanted."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import tinyq_lightning

NAME = "tinyq_lightning"
ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / NAME


MODULES = [
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for file in sorted(PACKAGE.rglob("*.py"))
]


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
    if module.endswith("triton_product"):
        pytest.importorskip("triton")  # what the module is written in
    loaded = importlib.import_module(module)
    assert loaded.__doc__
    for name in getattr(loaded, "__all__", []):
        thing = getattr(loaded, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert own_docstring(thing), f"{module}.{name} has no docstring of its own"
