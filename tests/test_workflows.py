"""The callback in the tools that people run experiments with, each the real one."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import nbclient
import nbformat
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.tuner import Tuner
from models import Blobs, Net, keeper, loader, trainer
from omegaconf import OmegaConf

from tinyq_lightning import TinyQCallback, load_quantized

TESTS = Path(__file__).parent


def run(folder: Path, *words: object) -> str:
    """What a process of its own printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "WANDB_MODE": "offline"}
    environment |= {"WANDB_DATA_DIR": str(folder), "WANDB_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, words)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lightning_cli(monkeypatch, folder: Path, *words: object) -> LightningCLI:
    """A command line of the user's own, as ``python main.py WORDS`` runs it in a folder."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["main.py", *map(str, words)])
    return LightningCLI(Net, Blobs)


FLAGS = [
    *("--seed_everything=3", "--model.width=24", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"),
    *("--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=logs"),
    *("--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false"),
    *("--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint", "--trainer.callbacks.monitor=val_acc"),
    "--trainer.callbacks.mode=max",
    "--trainer.callbacks+=tinyq_lightning.TinyQCallback",
    *("--trainer.callbacks.spec=w8a8", "--trainer.callbacks.exclude=[head]", "--trainer.callbacks.monitor=val_acc"),
    *("--trainer.callbacks.mode=max", "--trainer.callbacks.max_drop=0.9", "--trainer.callbacks.report=false"),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's use of jsonargparse
def test_flags_of_lightning_cli_are_saved_in_its_config_which_gives_the_same_file_again(tmp_path, monkeypatch):
    first = lightning_cli(monkeypatch, tmp_path / "first", "fit", *FLAGS)
    (made,) = Path("logs").rglob("w8a8-*.ckpt")
    (config,) = Path("logs").rglob("config.yaml")
    assert "TinyQCallback" in config.read_text()
    again = lightning_cli(monkeypatch, tmp_path / "again", "fit", "--config", tmp_path / "first" / config)
    assert (tmp_path / "again" / made).read_bytes() == (tmp_path / "first" / made).read_bytes()
    for cli in (first, again):
        callback = next(each for each in cli.trainer.callbacks if isinstance(each, TinyQCallback))
        assert {each.name: each.method for each in callback.plan} == {
            **dict.fromkeys(("body.0", "body.2"), "w8a8"),
            "head": "float",
        }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_help_of_lightning_cli_says_what_each_argument_is(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        lightning_cli(monkeypatch, tmp_path, "fit", "--trainer.callbacks.help", "tinyq_lightning.TinyQCallback")
    shown = " ".join(capsys.readouterr().out.split()).partition("Help for")[2]
    for name in inspect.signature(TinyQCallback).parameters:
        said = re.search(rf"\.{name}\+? \S+ (?!-)(.*?) \(type:", shown)
        assert said is not None, name
        assert len(said[1].split()) > 3, f"{name}: {said[1]}"


HYDRA = """
import hydra
from hydra.utils import instantiate
from models import Net, keeper, loader, trainer

@hydra.main(version_base=None, config_path=".", config_name="config")
def main(config):
    callback = instantiate(config.tinyq)
    trainer(".", keeper("."), callback).fit(Net(), loader(shuffle=True), loader(seed=1))
    assert callback.error is None, callback.error

main()
"""
HYDRA_CONFIG = """
method: w8a32
left: head
tinyq:
  _target_: tinyq_lightning.TinyQCallback
  spec:
    method: ${method}
    rules: [{match: "${left}", method: float}]
  exclude: []
"""


def test_hydras_multirun_over_methods_has_a_folder_and_a_file_for_each(tmp_path):
    (tmp_path / "run.py").write_text(HYDRA)
    (tmp_path / "config.yaml").write_text(HYDRA_CONFIG)
    run(tmp_path, "run.py", "--multirun", "method=w8a32,w8a8", "hydra.sweep.dir=sweep", "hydra.job.chdir=True")
    for number, method in enumerate(("w8a32", "w8a8")):
        folder = tmp_path / "sweep" / str(number)
        (path,) = folder.rglob("*-epoch=*.ckpt")
        plan = torch.load(path, weights_only=True)["tinyq"]["plan"]
        assert {row["method"] for row in plan if row["name"] == "head"} == {"float"}
        assert {row["method"] for row in plan if row["name"] != "head"} == {method}


@dataclass
class RuleConfig:
    match: str = "head"
    method: str = "float"


@dataclass
class TinyQConfig:
    method: str = "w8a16"
    exclude: list[str] = field(default_factory=list)
    rules: list[RuleConfig] = field(default_factory=lambda: [RuleConfig()])


def test_a_structured_config_is_a_spec(tmp_path):
    config = OmegaConf.merge(OmegaConf.structured(TinyQConfig), {"method": "w8a8"})
    callback = TinyQCallback(config)
    trainer(tmp_path, callback).fit(Net(), loader(), loader(seed=1))
    assert callback.error is None
    assert {each.name: each.method for each in callback.plan}["head"] == "float"
    assert {each.method for each in callback.plan} == {"w8a8", "float"}


def test_the_tuner_finds_its_learning_rate_and_the_fit_after_it_is_quantized(tmp_path):
    callback = TinyQCallback("w8a32")
    module, fitting = Net(), trainer(tmp_path, callback)
    found = Tuner(fitting).lr_find(module, loader(), loader(seed=1), num_training=10)
    assert found.suggestion() is not None or found.results["lr"]
    assert list(tmp_path.rglob("w8a32-*")) == [], "the tuner's own fits are no runs to quantize"
    fitting.fit(module, loader(), loader(seed=1))
    assert callback.error is None
    assert Path(callback.quantized_path).is_file()


def test_the_tuner_finds_its_batch_size_and_leaves_no_file(tmp_path):
    callback, data = TinyQCallback("w8a32"), Blobs()
    data.batch_size, module, fitting = 2, Net(), trainer(tmp_path, callback)
    assert Tuner(fitting).scale_batch_size(module, datamodule=data, max_trials=2, steps_per_trial=1) > 2
    assert list(tmp_path.rglob("w8a32-*")) == []


def test_checkpoints_in_a_remote_folder_have_their_quantized_file_and_report_there(tmp_path):
    callback = TinyQCallback("w8a32")
    saver = ModelCheckpoint(dirpath="memory://workflows/run", monitor="val_loss")
    trainer(tmp_path, saver, callback).fit(Net(), loader(), loader(seed=1))
    assert callback.error is None
    assert callback.quantized_path.startswith("memory://workflows/run/w8a32-")
    names = [path.rpartition("/")[2] for path in fsspec.filesystem("memory").ls("/workflows/run", detail=False)]
    assert {name.rpartition(".")[2] for name in names if name.startswith("w8a32-")} == {"ckpt", "json", "html", "yaml"}
    assert load_quantized(callback.quantized_path, Net)(torch.ones(1, 8)).isfinite().all()


def test_a_fit_that_stops_early_is_quantized_at_its_best(tmp_path):
    callback = TinyQCallback("w8a32")
    stopping = EarlyStopping("val_loss", patience=1, stopping_threshold=10.0)
    fitting = trainer(tmp_path, keeper(tmp_path), stopping, callback, max_epochs=50)
    fitting.fit(Net(), loader(), loader(seed=1))
    assert fitting.current_epoch < 50
    assert callback.float_path == fitting.checkpoint_callback.best_model_path
    assert callback.error is None


def test_a_last_checkpoint_that_is_a_link_is_read_and_stays_a_link(tmp_path):
    callback = TinyQCallback("w8a32", weights="last")
    saver = ModelCheckpoint(dirpath=tmp_path, save_last="link", monitor="val_loss")
    trainer(tmp_path, saver, callback).fit(Net(), loader(), loader(seed=1))
    assert callback.error is None
    assert (tmp_path / "last.ckpt").is_symlink()
    assert load_quantized(callback.quantized_path, Net)(torch.ones(1, 8)).isfinite().all()


WANDB = """
import sys
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from models import Net, keeper, loader, trainer
from tinyq_lightning import TinyQCallback

logger = WandbLogger(project="tinyq", save_dir=".", offline=True, log_model=False)
callback = TinyQCallback("w8a8", log_files=True)
run = trainer(".", keeper("."), callback, logger=[logger, CSVLogger(".")])
run.fit(Net(), loader(shuffle=True), loader(seed=1))
assert callback.error is None, callback.error
summary = dict(logger.experiment.summary)
print("DELTA", summary["tinyq/val_loss/delta"])
print("TABLES", sorted(key for key in summary if key.startswith("tinyq/layers") or key == "tinyq/comparison"))
logger.experiment.finish()
"""


@pytest.mark.slow
def test_weights_and_biases_gets_figures_tables_and_files_offline(tmp_path):
    (tmp_path / "run.py").write_text(WANDB)
    shown = run(tmp_path, "run.py")
    assert "DELTA " in shown
    assert "TABLES ['tinyq/comparison', 'tinyq/layers/w8a8']" in shown
    (written,) = tmp_path.rglob("run-*.wandb")
    assert b"tinyq-w8a8-epoch" in written.read_bytes(), "the artifact"
    staged = [path.read_bytes() for path in (tmp_path / "artifacts").rglob("*") if path.is_file()]
    for ending in ("ckpt", "json", "html", "yaml"):
        (made,) = tmp_path.glob(f"w8a8-*.{ending}")
        assert made.read_bytes() in staged


CELLS = (
    "from models import Net, keeper, loader, trainer\nfrom tinyq_lightning import TinyQCallback, quantize",
    "plan = quantize(Net(), 'w8a32')\nplan",
    "callback = TinyQCallback('w8a32')\n"
    "run = trainer('.', keeper('.'), callback, strategy='ddp_notebook', devices=2)\n"
    "run.fit(Net(), loader(), loader(seed=1))\nprint(callback.error, sorted(callback.results))",
)


@pytest.mark.slow
def test_a_notebook_shows_the_plan_as_a_table_and_fits_on_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), *sys.path]))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = notebook.cells[1].outputs[0]["data"]
    assert shown["text/html"].startswith("<table>")
    assert "None ['val" in "".join(each.get("text", "") for each in notebook.cells[2].outputs)
    assert list(tmp_path.rglob("w8a32-*.ckpt"))
