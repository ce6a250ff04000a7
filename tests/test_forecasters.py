"""Models of darts and neuralforecast, which train with pytorch_lightning, with the callback as their users pass it.

``make test-forecasters`` installs both into an environment of their own. Elsewhere these tests are skipped.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics import MetricCollection

from tinyq_lightning import TinyQCallback, load_quantized

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, and ours of objects that a file cannot hold

WAVE = np.sin(np.arange(300) / 6).astype("float32")
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("NBEATSModel", {"num_stacks": 2, "num_blocks": 1, "layer_widths": 32}),
        ("TiDEModel", {"hidden_size": 32}),
        ("TransformerModel", {"d_model": 16, "nhead": 2, "dim_feedforward": 32}),
        ("TCNModel", {"kernel_size": 3, "num_filters": 8}),
        ("BlockRNNModel", {"model": "LSTM", "hidden_dim": 16}),
    ],
)
def test_a_model_of_darts_trains_is_quantized_and_predicts_after_reloading(tmp_path, name, sizes):
    models = pytest.importorskip("darts.models")
    series = pytest.importorskip("darts").TimeSeries.from_values(WAVE)
    callback = TinyQCallback("w8a32", dirpath=str(tmp_path), report=False, strict=True)
    model = getattr(models, name)(
        input_chunk_length=24,
        output_chunk_length=4,
        n_epochs=2,
        random_state=1,
        work_dir=str(tmp_path),
        save_checkpoints=True,
        pl_trainer_kwargs={"callbacks": [callback], **QUIET},
        **sizes,
    )
    model.fit(series[:220], val_series=series[196:])
    assert callback.results["val_loss"]["w8a32"] == pytest.approx(callback.results["val_loss"]["float"], rel=0.02)
    assert not callback.plan.is_float
    best = type(model).load_from_checkpoint(model.model_name, work_dir=str(tmp_path), trusted=True)
    expected = best.predict(4, series=series[:220]).values()
    objects = {"optimizer_cls": torch.optim.Adam, "loss_fn": torch.nn.MSELoss()}
    objects |= {name: MetricCollection([]) for name in ("torch_metrics_train", "torch_metrics_val")}
    best.model = load_quantized(callback.quantized_path, type(model.model), **objects)
    predicted = best.predict(4, series=series[:220]).values()
    assert 0 < np.abs(predicted - expected).max() < 0.05


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("NHITS", {"mlp_units": 3 * [[32, 32]]}),
        ("PatchTST", {"hidden_size": 16, "n_heads": 2, "linear_hidden_size": 32, "patch_len": 8, "stride": 4}),
        ("LSTM", {"encoder_hidden_size": 16, "decoder_hidden_size": 16}),
        ("TCN", {"encoder_hidden_size": 16, "decoder_hidden_size": 16}),
        ("TFT", {"hidden_size": 16, "n_head": 2}),
    ],
)
def test_a_model_of_neuralforecast_trains_is_quantized_and_predicts_after_reloading(tmp_path, name, sizes):
    neuralforecast = pytest.importorskip("neuralforecast")
    pandas = pytest.importorskip("pandas")
    losses = pytest.importorskip("neuralforecast.losses.pytorch")
    kind = getattr(pytest.importorskip("neuralforecast.models"), name)
    callback = TinyQCallback("w8a32", dirpath=str(tmp_path), report=False, strict=True)
    model = kind(h=4, input_size=24, max_steps=20, val_check_steps=10, callbacks=[callback], **QUIET, **sizes)
    forecasts = neuralforecast.NeuralForecast(models=[model], freq=1)
    forecasts.fit(pandas.DataFrame({"unique_id": 1, "ds": np.arange(300), "y": WAVE}), val_size=40)
    trained = forecasts.models[0]  # a copy, whose callbacks are copies as well
    (ran,) = (each for each in trained.trainer_kwargs["callbacks"] if isinstance(each, TinyQCallback))
    assert ran.results["valid_loss"]["w8a32"] == pytest.approx(ran.results["valid_loss"]["float"], rel=0.02)
    expected = forecasts.predict()[name].to_numpy()
    loss = losses.MAE()
    forecasts.models[0] = load_quantized(ran.quantized_path, kind, loss=loss, valid_loss=loss, callbacks=[])
    predicted = forecasts.predict()[name].to_numpy()
    assert 0 < np.abs(predicted - expected).max() < 0.05
