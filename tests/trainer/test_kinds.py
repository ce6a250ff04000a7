"""One run over layers of every kind: the plan, the search, timings, the report, and the same file by every door."""

from __future__ import annotations

import json

import pytest
import torch
from mixed import RULE, Mixed
from models import FEATURES, keeper, loader, trainer
from ranks import run_on_ranks, written_by_ranks

from tinyq_lightning import QuantizedCheckpointMixin, TinyQCallback, load_quantized, quantize, quantized
from tinyq_lightning.file import (
    Archive,
    make_checkpoint,
    quantize_file,
    read_safetensors,
    write_checkpoint,
    write_safetensors,
)
from tinyq_lightning.file.checkpoint import file_sha256, read_checkpoint
from tinyq_lightning.search import timing
from tinyq_lightning.spec import as_spec

SPEC = {"method": "w8a8", "rules": [RULE]}
PLAN = {
    "body.0": ("linear", "w8a8"),
    "body.2": ("linear", "w8a8"),
    "head": ("linear", "w8a8"),
    "conv": ("conv", "w8a8"),
    "up": ("conv", "w8a32"),
    "lstm": ("recurrent", "w8a32"),
    "words": ("embedding", "w8a32"),
    "bag": ("embedding", "w8a32"),
    "attention.in_proj": ("attention", "w8a8"),
    "attention.out_proj": ("attention", "w8a8"),
    "out": ("linear", "w8a8"),
    "table": ("matrix", "w8a32"),
}


class MixedIn(QuantizedCheckpointMixin, Mixed):
    pass


def fit(folder, callback, kind=Mixed, **settings):
    run, module = trainer(folder, keeper(folder), callback, **settings), kind()
    before = {name: type(each) for name, each in module.named_modules()}
    run.fit(module, loader(shuffle=True), loader(seed=1))
    assert callback.error is None
    assert {name: type(each) for name, each in module.named_modules()} == before
    return module


def points():
    return torch.randn(7, FEATURES, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    callback = TinyQCallback(SPEC, report=False)
    fit(folder, callback)
    return callback


def test_the_plan_has_every_layer_with_its_kind_and_its_method(saved):
    assert {each.name: (each.kind, each.method) for each in saved.plan} == PLAN
    assert saved.plan.label == "w8a8"
    reasons = {each.name: each.reason for each in saved.plan}
    assert reasons["lstm"].startswith("spec; ")
    assert reasons["up"].startswith("spec; ")
    assert reasons["words"] == "tied to out.weight; a look-up has no activations"
    assert next(each for each in saved.plan if each.name == "out").tied_to == "words"
    assert "kind" in saved.plan.table().splitlines()[0].split()


def test_every_door_gives_the_same_bits(saved, tmp_path):
    module = Mixed.load_from_checkpoint(saved.float_path, weights_only=True).eval()
    with quantized(module, saved.plan.to_spec()) as plan:
        wanted, output = {name: value.clone() for name, value in module.state_dict().items()}, module(points())
    assert list(plan) == list(saved.plan)
    write_safetensors(read_checkpoint(saved.quantized_path), str(tmp_path / "q.safetensors"))
    write_checkpoint(read_safetensors(str(tmp_path / "q.safetensors")), str(tmp_path / "again.ckpt"))
    doors = [load_quantized(path, Mixed) for path in (saved.quantized_path, str(tmp_path / "again.ckpt"))]
    doors.append(MixedIn.load_from_checkpoint(saved.quantized_path, weights_only=True).eval())
    for loaded in doors:
        assert loaded.state_dict().keys() == wanted.keys()
        assert all(torch.equal(value, wanted[name]) for name, value in loaded.state_dict().items())
        assert torch.equal(loaded(points()), output)
        assert loaded.words.int8_weights is loaded.out.int8_weights
    run = trainer(tmp_path, TinyQCallback(report=False))
    tested = run.test(module, loader(seed=2), ckpt_path=saved.quantized_path, verbose=False)
    assert tested == trainer(tmp_path).test(doors[0], loader(seed=2), verbose=False)
    assert type(module.lstm) is torch.nn.LSTM
    assert torch.equal(module.table, doors[0].table), "the float module goes on with the dequantized weights"
    assert torch.equal(module.conv.weight, doors[0].conv.weight)


def test_from_file_to_file_and_in_memory_give_the_same_file(saved, tmp_path):
    with Archive(saved.float_path) as source:
        content = quantize_file(source, Mixed, as_spec(SPEC), {})[0]
    module = Mixed.load_from_checkpoint(saved.float_path, weights_only=True)
    plan, base = quantize(module, SPEC), torch.load(saved.float_path, weights_only=True)
    own = make_checkpoint(base, module.state_dict(), plan, {}, file_sha256(saved.float_path), None)
    paths = [tmp_path / name for name in ("streamed.ckpt", "memory.ckpt")]
    for each, path in zip((content, own), paths, strict=True):
        write_checkpoint(each, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    filed = read_checkpoint(saved.quantized_path)["state_dict"]
    assert filed.keys() == content["state_dict"].keys()
    assert all(torch.equal(value, content["state_dict"][name]) for name, value in filed.items())


@pytest.mark.filterwarnings("ignore:TinyQ. w8a8. budget NOT met")
def test_budget_full_report_and_never_slower_go_over_all_kinds(tmp_path, monkeypatch):
    real = timing.time_call

    def time_call(layers, call):
        real(layers, call)
        return timing.Timing(1.0, 2.0 if isinstance(layers[0][0], torch.nn.EmbeddingBag) else 1.0)

    monkeypatch.setattr(timing, "time_call", time_call)
    callback = TinyQCallback(SPEC, monitor="val_loss", mode="max", max_drop=0.0, report="full", never_slower=True)
    fit(tmp_path, callback)
    told = json.loads(next(tmp_path.rglob("*.json")).read_text())
    assert {each["kind"] for each in told["never_slower"]["timings"]} >= {"linear", "conv", "embedding", "recurrent"}
    assert "not_timed" not in told["never_slower"]
    layers = {each["name"]: each for each in told["layers"]}
    slower = f"left float: quantized, it took 2.00x the time of float at [32, {FEATURES}]"
    assert layers["bag"]["reason"].startswith(slower)
    for name, (kind, method) in PLAN.items():
        if name in ("bag", "table"):
            continue
        errors = layers[name]["output_sqnr_db"]
        assert set(errors) == ({"w8a32"} if method == "w8a32" else {"w8a32", "w8a16", "w8a8"}), name
        assert all(20 < value < 90 for value in errors.values()), (name, errors)
        assert (layers[name]["crest"] is None) == (kind == "embedding")
    assert told["budget"]["trials"]
    again = TinyQCallback(callback.plan.to_spec(), report=False)
    fit(tmp_path / "again", again)
    assert [(each.name, each.method, each.reason) for each in again.plan] == [
        (each.name, each.method, each.reason) for each in callback.plan
    ]


def test_a_budget_gives_layers_up_whatever_their_kind(tmp_path):
    callback = TinyQCallback(SPEC, monitor="val_loss", mode="min", max_drop=1e9, report=False)
    module = fit(tmp_path, callback)
    assert all(each.method != "float" or each.decided_by == "layer" for each in callback.plan)
    assert type(module.table) is torch.nn.Parameter


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    run_on_ranks("ddp_kinds.py", tmp_path)
    ranks = written_by_ranks(tmp_path, "fit")
    assert ranks[0] == ranks[1]
    assert ranks[0]["error"] is None
    assert {name: tuple(each) for name, each in ranks[0]["plan"].items()} == PLAN
    assert load_quantized(ranks[0]["path"], Mixed)
