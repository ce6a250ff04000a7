"""Resident memory of quantizing and of what is left, for many Linear layers, each task in a process of its own.

Needs 2 GB of memory and of disk for a moment.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from tinyq_lightning.table import Table, format_bytes

WIDTH, DEPTH = 4096, 12
PROCESSES = ("in_memory", "quantize_file", "load_file", "quantize_four_bits")
SHOWN = {
    "in_place": "`quantize(model)` in place: peak above the float model",
    "kept": "the quantized model after its first forward pass",
    "file": "`tinyq-lightning quantize`, file to file: peak above an idle process",
    "file_w4": "the same to four bits",
    "load": "`load_quantized`: peak above an idle process",
}


def write_float_checkpoint(path: Path, width: int, depth: int) -> None:
    """As Lightning writes one of ``wide.Wide``, whose import would take longer than all else here."""
    layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
    content = {
        "state_dict": {f"layers.{name}": tensor for name, tensor in layers.state_dict().items()},
        "hyper_parameters": {"width": width, "depth": depth},
        "pytorch-lightning_version": "2.6.6",
        "epoch": 0,
        "global_step": 0,
    }
    torch.save(content, path)


def measure(args: argparse.Namespace) -> list[dict]:
    if not Path("/proc/self/status").exists():
        return [{"part": "memory", "contender": "memory", "failed": "it reads /proc, which only Linux has"}]
    width, depth = (512, 4) if args.quick else (WIDTH, DEPTH)
    float_bytes = depth * (width * width + width) * 4
    cells: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        write_float_checkpoint(Path(folder, "float.ckpt"), width, depth)
        for process in PROCESSES:
            command = [sys.executable, "-W", "ignore", "memory_tasks.py", process, folder, str(width), str(depth)]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parent)
            for name, (before, after) in json.loads(run.stdout.splitlines()[-1]).items():
                share = (after - before) / float_bytes
                place = {"part": "memory", "contender": name, "float_bytes": float_bytes}
                cells.append({**place, "before": before, "after": after, "share": share})
                print(f"memory, {name}: {share:.3f} of the float weights", file=sys.stderr, flush=True)
    return cells


def table(cells: list[dict]) -> tuple[str, Table]:
    title = f"Resident memory, as a share of {format_bytes(cells[0]['float_bytes'])} of float32 weights"
    return title, Table(["", "share"], [[SHOWN[cell["contender"]], f"{cell['share']:.3f}"] for cell in cells])
