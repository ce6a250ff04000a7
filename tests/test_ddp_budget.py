"""A search on two CPU processes: every rank decides alike, even where the metric differs from rank to rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_ranks_search_alike(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    command = [sys.executable, "-W", "ignore", str(HERE / "scripts" / "ddp_budget.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for monitor in ("val_rank_loss", "val_acc"):
        ranks = [json.loads((tmp_path / f"{monitor}-{rank}.json").read_text()) for rank in (0, 1)]
        assert ranks[0] == ranks[1]
        assert len(ranks[0]["trials"]) > 1, "there was something to search"
