"""Two CPU processes: the same numbers and the same errors on every rank, one file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import Net, loader, trainer
from ranks import run_on_ranks, written_by_ranks

from tinyq_lightning import load_quantized


@pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(how, marks=pytest.mark.slow) for how in ("ddp_spawn", "ddp_fork"))]
)
def test_ranks_agree_and_one_file_is_written(tmp_path, strategy):
    done = run_on_ranks("ddp_run.py", tmp_path, strategy)
    assert "tinyq/val_acc/w8a32" in done.stdout, "callback_metrics come back from spawned processes"
    assert done.stdout.count("TinyQ: 100 % of the weight bytes in int8") == (2 if strategy == "ddp" else 1), (
        "each table once, by rank 0"
    )
    assert len(list(tmp_path.glob("w8a32-*.pt2"))) == 1, "exported once, by rank 0"
    for stage, method in (("fit", "w8a32"), ("test", "w8a8")) if strategy == "ddp" else (("fit", "w8a32"),):
        ranks = written_by_ranks(tmp_path, stage)
        assert ranks[0] == ranks[1]
        assert Path(ranks[0]["path"]).exists()
        assert len(list(tmp_path.glob(f"{method}-*.ckpt"))) == 1
        seen = ranks[0]["results"]
        assert f"{'val' if stage == 'fit' else 'test'}_acc" in seen
        # the metric objects are synchronized, so two ranks see what one process sees
        module = load_quantized(ranks[0]["path"], Net)
        run = trainer(tmp_path)
        alone = run.validate if stage == "fit" else run.test
        separate = alone(module, loader(seed=1 if stage == "fit" else 2), verbose=False)[0]
        for name in (name for name in separate if name.endswith(("_acc", "_f1", "_recall"))):
            assert seen[name][method] == pytest.approx(separate[name], abs=1e-6)
    main = json.loads((tmp_path / "main.json").read_text())
    ranks = written_by_ranks(tmp_path, "fit")
    assert (main["results"], main["path"], main["error"]) == (ranks[0]["results"], ranks[0]["path"], None)
    assert Path(main["float_path"]).exists()
    assert len(main["plan"]) == 3
    assert main["plans"] == ["w8a32"]
    floats = torch.load(next(tmp_path.glob("epoch=*.ckpt")), weights_only=True)
    assert "optimizer_states" in floats


@pytest.mark.slow
def test_a_rank_that_fails_is_waited_for_by_none_and_all_know_why(tmp_path):
    run_on_ranks("ddp_failures.py", tmp_path)
    for place, rank in (("load", 1), ("loop", 1), ("loop", 0), ("save", 1), ("log", 0)):
        ranks = written_by_ranks(tmp_path, f"{place}{rank}")
        assert ranks[0] == ranks[1]
        assert f"{place} on rank {rank}" in ranks[0]["error"]
        assert (ranks[0]["path"] is not None) == (place == "log")
        assert bool(ranks[0]["results"]) == (place in ("save", "log"))
        assert ranks[0]["validated"], "the processes can still talk to one another"
    ranks = written_by_ranks(tmp_path, "nowhere0")
    assert ranks[0] == ranks[1]
    assert ranks[0]["error"] is None
    assert ranks[0]["results"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "when", "said"),
    [
        ("exit", "validating", "rank 1 has ended: SystemExit: 3"),
        ("interrupt", "validating", "rank 1 has ended: KeyboardInterrupt, so"),
        ("kill", "validating", "another process does not answer ("),
        ("exit", "gathering", "rank 1 has ended: SystemExit: 3"),
    ],
)
def test_a_rank_that_ends_ends_the_run(tmp_path, how, when, said):
    done = run_on_ranks("ended.py", tmp_path, how, when, fails=True)
    assert "went on" not in done.stdout
    assert said in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_where_no_rank_can_be_interrupted_one_that_fails_ends_the_run(tmp_path, rank):
    done = run_on_ranks("ddp_not_heard.py", tmp_path, rank, fails=True)
    assert "went on" not in done.stdout
    assert f"NotHeardError: rank {rank} cannot tell the others" in done.stderr
    assert f"loop on rank {rank}" in done.stderr
    assert list(tmp_path.rglob("epoch=*.ckpt")), "the float checkpoint is there"
