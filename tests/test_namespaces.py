"""Modules, Trainers and callbacks of ``lightning.pytorch`` and of ``pytorch_lightning``, and of both in one process."""

import ast
import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from lightnings import NAMESPACE, OTHER, Callback, LightningModule, Trainer
from models import Blobs, Net, loader, trainer

from tinyq_lightning import QuantizedModelSummary, TinyQCallback, TinyQError, load_quantized
from tinyq_lightning.command import main
from tinyq_lightning.errors import ModelError, TrainerError
from tinyq_lightning.namespaces import NAMESPACES, derives_from, namespace_of, refuse_other_namespace

pytest.importorskip(OTHER)

BOTH = [each.name for each in NAMESPACES]


def refused_by_lightning() -> str:
    """What Lightning says of a callback of the other package, which it takes from 2.6 on; empty there."""
    try:
        Trainer(callbacks=[importlib.import_module(OTHER).Callback()], accelerator="cpu", logger=False)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def run(code: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("package", BOTH)
def test_the_callback_is_one_of_a_package_that_is_imported_after_it(package):
    code = f"""
from tinyq_lightning import QuantizedModelSummary, TinyQCallback
import {package} as pl
from tinyq_lightning import TinyQCallback as again
assert again is TinyQCallback
assert issubclass(TinyQCallback, pl.Callback) and issubclass(QuantizedModelSummary, pl.callbacks.ModelSummary)
assert isinstance(TinyQCallback(), pl.Callback)
assert isinstance(QuantizedModelSummary(max_depth=2), pl.callbacks.ModelSummary)
"""
    run(code)


@pytest.mark.parametrize("package", BOTH)
def test_the_other_package_is_not_imported_and_the_log_stays_with_the_first(package):
    other = BOTH[1 - BOTH.index(package)]
    code = f"""
import sys
from pathlib import Path
import {package}
from lightning_utilities.core import rank_zero
before = rank_zero.log.name
import tinyq_lightning
tinyq_lightning.TinyQCallback()
tinyq_lightning.summarize
import tinyq_lightning.command.run_commands
assert {other!r} not in sys.modules
assert rank_zero.log.name == before
"""
    run(code)


def test_a_callback_is_one_of_both_packages_and_comes_out_of_a_pickle_as_one():
    callback = TinyQCallback("w8a16", exclude=["head"])
    for name in BOTH:
        kinds = importlib.import_module(name)
        assert isinstance(callback, kinds.Callback)
        assert isinstance(QuantizedModelSummary(), kinds.callbacks.ModelSummary)
    code = f"""
import pickle, sys
callback = pickle.loads({pickle.dumps(callback)!r})
import {OTHER} as pl
assert callback.spec.method == "w8a16"
assert isinstance(pickle.loads(pickle.dumps(callback)), pl.Callback)
"""
    run(code)


def test_a_class_of_the_users_may_derive_from_the_callback_and_from_either_base():
    for name in BOTH:
        kind = importlib.import_module(name).Callback

        class Mine(TinyQCallback, kind):
            pass

        assert Mine("w8a8").spec.method == "w8a8"


def test_objects_and_classes_tell_the_package_they_are_of():
    other = importlib.import_module(OTHER)
    assert namespace_of(Net).name == namespace_of(Net()).name == namespace_of(Trainer).name == NAMESPACE
    assert namespace_of(other.LightningModule).name == OTHER
    assert derives_from(Net, "LightningModule")
    assert not derives_from(Net, "Trainer")
    with pytest.raises(TrainerError, match=r"neither lightning\.pytorch nor pytorch_lightning"):
        namespace_of(3)


def test_mixed_packages_are_refused_with_the_import_to_write(tmp_path):
    other = importlib.import_module(OTHER)

    class Data(other.LightningDataModule):
        def train_dataloader(self):
            return loader()

    run = trainer(tmp_path, TinyQCallback("w8a32"))
    with pytest.raises(TrainerError, match=rf"write `from {NAMESPACE} import LightningDataModule` where Data is def"):
        run.fit(Net(), datamodule=Data())
    for stage in (run.fit, run.test):
        with pytest.raises(TrainerError, match=rf"write `from {NAMESPACE} import LightningDataModule` where Data is"):
            stage(Net(), Data())
    if not refused_by_lightning():
        kept = trainer(tmp_path, TinyQCallback("w8a32"), other.callbacks.ModelCheckpoint(), enable_checkpointing=False)
        with pytest.raises(TrainerError, match=rf"write `from {NAMESPACE}.callbacks import ModelCheckpoint`, or"):
            kept.fit(Net(), loader(), loader(seed=1))
    refuse_other_namespace(run, None, TinyQCallback(), Blobs(), 3)


def test_callbacks_of_the_users_own_and_loggers_may_be_of_either_package(tmp_path):
    if said := refused_by_lightning():
        pytest.skip(f"Lightning before 2.6 takes callbacks of its own package only: {said}")
    other = importlib.import_module(OTHER)
    seen = []

    class Notes(other.Callback):
        def on_validation_batch_start(self, *args):
            seen.append(args)

    callback, logger = TinyQCallback("w8a32", report=False, strict=True), other.loggers.CSVLogger(tmp_path)
    trainer(tmp_path, Notes(), callback, logger=logger).fit(Net(), loader(), loader(seed=1))
    assert seen
    assert callback.results["val_acc"]
    assert "tinyq/" in (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()


def test_a_file_of_one_package_loads_into_a_class_of_the_other(fitted, tmp_path):
    callback, _, _ = fitted
    other = importlib.import_module(OTHER)
    body = {name: value for name, value in vars(Net).items() if name in ("forward", "evaluate", "test_step")}

    def init(self, width=16, lr=0.02):
        other.LightningModule.__init__(self)
        for name, child in Net(width, lr).named_children():
            setattr(self, name, child)

    there = type("There", (other.LightningModule,), {"__init__": init, **body})
    x = next(iter(loader()))[0]
    assert load_quantized(callback.quantized_path, there)(x).equal(load_quantized(callback.quantized_path, Net)(x))
    with pytest.raises(ModelError, match=r"a class of modules is needed, and Callback is no nn\.Module"):
        load_quantized(callback.quantized_path, Callback)


def test_evaluate_refuses_a_data_module_of_the_other_package(fitted, tmp_path, monkeypatch, capsys):
    (tmp_path / "there.py").write_text(f"from {OTHER} import LightningDataModule\nclass Data(LightningDataModule): ...")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    path = fitted[0].quantized_path
    assert main(["evaluate", path, "--model", "models:Net", "--data", "there:Data"]) == 1
    assert f"from {NAMESPACE} import LightningDataModule" in capsys.readouterr().err
    assert main(["evaluate", path, "--model", "models:Net", "--data", "models:loader"]) == 1
    assert "'models:loader' is not a LightningDataModule" in capsys.readouterr().err
    assert main(["evaluate", path, "--model", "models:Net", "--data", "models:Blobs"]) == 0


def test_lightning_cli_of_the_other_package_takes_the_callback_by_its_class_path_twice_in_a_process(tmp_path):
    module = f"""
import torch
from {OTHER} import LightningModule
class Small(LightningModule):
    def __init__(self, width: int = 8):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, width)
    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layer(batch).square().mean())
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(8, self.hparams.width), batch_size=4)
    val_dataloader = train_dataloader
"""
    (tmp_path / "small.py").write_text(module)
    (tmp_path / "run.yaml").write_text(f"""
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_progress_bar: false
  default_root_dir: {tmp_path}
  callbacks:
    - class_path: tinyq_lightning.TinyQCallback
      init_args: {{spec: w8a16, report: false, strict: true, dirpath: {tmp_path}}}
    - class_path: ModelCheckpoint
model: {{width: 8}}
""")
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(tmp_path)!r})
import small
from {OTHER}.cli import LightningCLI
for _ in range(2):
    cli = LightningCLI(small.Small, args=["fit", "--config", {str(tmp_path / "run.yaml")!r}], save_config_callback=None)
from tinyq_lightning import TinyQCallback, load_quantized
callback = next(each for each in cli.trainer.callbacks if isinstance(each, TinyQCallback))
print(callback.quantized_path)
load_quantized(callback.quantized_path, small.Small)
"""
    assert "w8a16" in run(code)


def test_a_module_of_the_other_package_is_refused_by_lightning_before_training(tmp_path):
    other = importlib.import_module(OTHER)
    callback = TinyQCallback("w8a32")
    with pytest.raises((TypeError, TinyQError), match="LightningModule"):
        trainer(tmp_path, callback).fit(type("Theirs", (other.LightningModule,), {})(), loader())
    assert callback.error is None
    assert issubclass(Net, LightningModule)


def test_no_module_imports_lightning_by_name_but_for_types():
    for file in (Path(__file__).parents[1] / "tinyq_lightning").rglob("*.py"):
        tree = ast.parse(file.read_text())
        typed = {node for found in ast.walk(tree) if _is_for_types(found) for node in ast.walk(found)}
        for node in ast.walk(tree):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            named += [each.name for each in node.names] if isinstance(node, ast.Import) else []
            packages = {name.partition(".")[0] for name in named}
            assert node in typed or packages.isdisjoint(("lightning", "pytorch_lightning")), (
                f"{file.name}:{node.lineno}"
            )


def _is_for_types(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
