"""Every file in configs/ loads, and fits the model it is written for."""

import importlib.util
import sys
from pathlib import Path

import pytest
import yaml

import tinyq_lightning
from tinyq_lightning import QuantizationSpec, quantize
from tinyq_lightning.methods import METHODS
from tinyq_lightning.plan.resolution import resolve
from tinyq_lightning.spec.spec import as_spec

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def content(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


SPECS = [path for path in CONFIGS if "method" in content(path)]
EXPERIMENTS = [path for path in CONFIGS if path not in SPECS]


@pytest.fixture(scope="module")
def digits():
    """The module ``examples/digits_data.py``."""
    spec = importlib.util.spec_from_file_location("digits_data", ROOT / "examples" / "digits_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def callbacks_spec(path):
    entries = content(path)["trainer"]["callbacks"]
    return next(e["init_args"]["spec"] for e in entries if e["class_path"] == "tinyq_lightning.TinyQCallback")


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.name)
def test_every_spec_loads_fits_the_digits_network_and_reads_back(path, digits, tmp_path):
    spec = QuantizationSpec.from_yaml(path)
    model = digits.DigitsNet()
    assert all(len(resolve(each, model)) == 6 for each in spec.each())
    again = tmp_path / "again.yaml"
    spec.to_yaml(again)
    assert QuantizationSpec.from_yaml(again) == spec


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_is_commented(path):
    assert "# " in path.read_text(encoding="utf-8")


def test_each_method_has_a_config_of_its_name():
    for method in METHODS:
        path = ROOT / "configs" / f"{method}.yaml"
        assert path in SPECS
        assert QuantizationSpec.from_yaml(path).method == method


def test_mixed_gives_the_digits_network_several_methods(digits):
    plan = quantize(digits.DigitsNet(width=16), ROOT / "configs" / "mixed.yaml")
    assert {d.name: (d.method, d.reason) for d in plan} == {
        "stem": ("w8a32", "spec"),
        "blocks.0.1": ("w8a8", "rule 1"),
        "blocks.0.3": ("w8a16", "rule 2"),
        "blocks.1.1": ("w8a8", "rule 1"),
        "blocks.1.3": ("w8a16", "rule 2"),
        "head": ("float", "excluded"),
    }
    assert plan.label == "mixed"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's use of jsonargparse
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_every_experiment_is_one_that_lightning_cli_builds(path, digits, tmp_path, monkeypatch):
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["digits_cli.py"])
    cli = LightningCLI(digits.DigitsNet, digits.Digits, args=["--config", str(path)], run=False)
    assert any(isinstance(callback, tinyq_lightning.TinyQCallback) for callback in cli.trainer.callbacks)
    assert resolve(as_spec(callbacks_spec(path)), cli.model).label in METHODS
