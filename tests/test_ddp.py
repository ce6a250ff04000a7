"""Two CPU processes: the same numbers on every rank, one file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import Net, loader, trainer

from tinyq_lightning import load_quantized

HERE = Path(__file__).parent


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_ranks_agree_and_one_file_is_written(tmp_path, strategy):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    command = [sys.executable, "-W", "ignore", str(HERE / "scripts" / "ddp_run.py"), str(tmp_path), strategy]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tinyq/val_acc/w8a32" in done.stdout, "callback_metrics come back from spawned processes"
    assert done.stdout.count("TinyQ: 3 of 3") == (2 if strategy == "ddp" else 1), "each table once, by rank 0"
    for stage, method in (("fit", "w8a32"), ("test", "w8a8")) if strategy == "ddp" else (("fit", "w8a32"),):
        ranks = [json.loads((tmp_path / f"{stage}-{rank}.json").read_text()) for rank in (0, 1)]
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
    floats = torch.load(next(tmp_path.glob("epoch=*.ckpt")), weights_only=True)
    assert "optimizer_states" in floats
