"""The entries reach every logger, ``callback_metrics`` and ``logged_metrics``; the table reaches the screen."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from lightnings import CSVLogger, MLFlowLogger, TensorBoardLogger
from models import Net, keeper, loader, trainer

from tinyq_lightning import TinyQCallback

KEYS = {
    *(f"tinyq/{name}/{key}" for name in ("val_acc", "val_f1", "val_loss") for key in ("float", "w8a32", "delta")),
    "tinyq/size_mb/float",
    "tinyq/size_mb/w8a32",
}


@pytest.fixture
def logged(tmp_path):
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")]
    callback = TinyQCallback("w8a32")
    run = trainer(tmp_path, keeper(tmp_path), callback, logger=loggers, log_every_n_steps=2)
    run.fit(Net(), loader(shuffle=True), loader(seed=1))
    return callback, run, loggers


def test_csv_has_every_entry_at_the_last_step(logged):
    callback, run, loggers = logged
    rows = list(csv.DictReader(Path(loggers[0].log_dir, "metrics.csv").read_text().splitlines()))
    ours = next(row for row in rows if row["tinyq/val_acc/w8a32"])
    assert set(ours) >= KEYS
    assert int(ours["step"]) == run.global_step
    for name, values in callback.results.items():
        for key, value in values.items():
            assert float(ours[f"tinyq/{name}/{key}"]) == pytest.approx(value, rel=1e-6, abs=1e-9)
    assert sum(bool(row["val_acc"]) for row in rows) == 2, "the comparison leaves no rows of its own"


def test_tensorboard_has_every_entry(logged):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(logged[2][1].log_dir)
    events.Reload()
    assert set(events.Tags()["scalars"]) >= KEYS
    assert len(events.Scalars("val_acc")) == 2


@pytest.mark.filterwarnings("ignore")  # of MLflow's and SQLAlchemy's among themselves
def test_mlflow_has_every_entry(tmp_path):
    logger = MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", artifact_location=str(tmp_path / "artifacts"))
    callback = TinyQCallback("w8a32")
    trainer(tmp_path, keeper(tmp_path), callback, logger=logger).fit(Net(), loader(shuffle=True), loader(seed=1))
    layers = next((tmp_path / "artifacts").rglob("tinyq/layers/w8a32.txt")).read_text(encoding="utf-8")
    assert all(decision.name in layers for decision in callback.plan)
    metrics = logger.experiment.get_run(logger.run_id).data.metrics
    assert set(metrics) >= KEYS
    assert metrics["tinyq/val_acc/w8a32"] == callback.results["val_acc"]["w8a32"]


def test_the_trainers_own_metrics_have_every_entry(logged):
    callback, run, _ = logged
    for metrics in (run.callback_metrics, run.logged_metrics):
        assert set(metrics) >= KEYS
        assert float(metrics["tinyq/val_acc/w8a32"]) == pytest.approx(callback.results["val_acc"]["w8a32"])
    assert float(run.callback_metrics["val_acc"]) <= 1, "the user's own keys are still there"


def test_sizes_are_those_of_the_state_dicts_in_megabytes(logged):
    callback, run, _ = logged
    linear = sum(decision.float_bytes for decision in callback.plan)
    assert float(run.callback_metrics["tinyq/size_mb/float"]) == pytest.approx(linear / 1e6)
    assert float(run.callback_metrics["tinyq/size_mb/w8a32"]) == pytest.approx(
        sum(d.bytes for d in callback.plan) / 1e6
    )


def test_the_table_names_metrics_sizes_and_both_files(tmp_path, capsys):
    callback = TinyQCallback("w8a32")
    trainer(tmp_path, keeper(tmp_path), callback).fit(Net(), loader(shuffle=True), loader(seed=1))
    shown = capsys.readouterr().out
    for text in ("val_acc", "val_f1", "weights", "file on disk", callback.float_path, callback.quantized_path):
        assert text in shown
    assert "100 % of the weight bytes in int8 (w8a32), 3 of 3 layers" in shown
