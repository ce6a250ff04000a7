"""A real run of a recurrent classifier: what its int8 file weighs and costs, in report, budget and timing too."""

from __future__ import annotations

import json

import pytest
import torch
from digits_data import Digits
from lightnings import LightningModule, seed_everything
from models import keeper, trainer
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from tinyq_lightning import TinyQCallback, load_quantized
from tinyq_lightning.layers import QuantizedLSTM
from tinyq_lightning.report import summarize
from tinyq_lightning.search import timing


class RowReader(LightningModule):
    """Reads an image of a digit row by row, in both directions."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.save_hyperparameters()
        self.lstm = nn.LSTM(8, width, 2, batch_first=True, bidirectional=True, dropout=0.1)
        self.head = nn.Linear(2 * width, 10)
        self.val_acc = MulticlassAccuracy(10, average="micro")

    def forward(self, x):
        return self.head(self.lstm(x.unflatten(1, (8, 8)))[0].amax(1))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.val_acc(logits, batch[1])
        self.log("val_acc", self.val_acc)
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=5e-3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The callback of a fit, its folder, and the module."""
    seed_everything(0, verbose=False)
    folder = tmp_path_factory.mktemp("run")
    callback, module = TinyQCallback("w8a32", report="full"), RowReader()
    trainer(folder, keeper(folder), callback, max_epochs=6).fit(module, Digits())
    assert callback.error is None
    return callback, folder, module


def test_the_file_is_a_quarter_and_accuracy_stays(run):
    callback, folder, module = run
    accuracy = callback.results["val_acc"]
    assert accuracy["float"] > 0.85
    assert abs(accuracy["w8a32"] - accuracy["float"]) <= 0.003
    torch.save({"state_dict": torch.load(callback.float_path, weights_only=True)["state_dict"]}, folder / "float.pt")
    size = (folder / next(iter(folder.glob("w8a32-*.ckpt")))).stat().st_size
    assert size <= 0.27 * (folder / "float.pt").stat().st_size
    loaded = load_quantized(callback.quantized_path, RowReader)
    assert isinstance(loaded.lstm, QuantizedLSTM)
    again = trainer(folder).validate(loaded, Digits(), verbose=False)[0]
    assert again["val_acc"] == pytest.approx(accuracy["w8a32"], abs=0)
    assert type(module.lstm) is nn.LSTM
    assert summarize(loaded).total_parameters == summarize(module).total_parameters


def test_the_full_report_measures_its_outputs(run):
    told = json.loads(next(run[1].glob("w8a32-*.json")).read_text())
    lstm = next(layer for layer in told["layers"] if layer["name"] == "lstm")
    assert (lstm["kind"], lstm["method"]) == ("recurrent", "w8a32")
    assert 30 < lstm["output_sqnr_db"]["w8a32"] < 80
    assert 40 < lstm["weight_sqnr_db"] < 60
    assert lstm["float_ms"] > 0
    assert lstm["bytes"] < 0.27 * lstm["float_bytes"]


@pytest.mark.filterwarnings("ignore:TinyQ. w8a8. budget NOT met")
def test_budget_and_never_slower_reach_it(tmp_path, monkeypatch):
    called = {}

    def time_call(layers, call):
        called.setdefault(type(layers[0][0]), set()).add(call.sizes)
        real(layers, call)
        return timing.Timing(1.0, 2.0 if isinstance(layers[0][0], nn.LSTM) else 1.0)

    real = timing.time_call
    monkeypatch.setattr(timing, "time_call", time_call)
    callback = TinyQCallback("w8a8", monitor="val_loss", mode="min", max_drop=0.5, never_slower=True)
    trainer(tmp_path, keeper(tmp_path), callback, max_epochs=1).fit(RowReader(16), Digits())
    assert callback.error is None
    assert called[nn.LSTM] == {(64, 8, 8), (40, 8, 8)}
    lstm = next(each for each in callback.plan if each.name == "lstm")
    assert (lstm.method, lstm.decided_by) == ("float", "timing")
    assert "2.00x the time of float at [64, 8, 8]" in lstm.reason
