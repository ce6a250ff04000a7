"""Scripts that run on two CPU processes, and what their ranks wrote."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

HERE = Path(__file__).parent


def run_on_ranks(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a file of ``scripts`` to its end; what it printed is in the result."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    command = [sys.executable, "-W", "ignore", str(HERE / "scripts" / script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def written_by_ranks(root: Path, stem: str) -> list[Any]:
    """What ranks 0 and 1 wrote to ``stem-<rank>.json``."""
    return [json.loads((root / f"{stem}-{rank}.json").read_text()) for rank in (0, 1)]


def leave_group_at_exit() -> None:
    """In a script: destroy the process group before Python finalizes.

    Otherwise a thread of gloo that lets go of its last tensor at that moment ends the process with "terminate called
    without an active exception" (pytorch/pytorch#190489). Processes that the script spawns import it, and do so too.
    """
    atexit.register(_leave_group)


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
