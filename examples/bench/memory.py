"""Resident memory of quantizing and of what is left, for many Linear layers, each task in a process of its own.

Needs 2 GB of memory and of disk for a moment.
"""

import argparse
import gc
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import nn

from tinyq_lightning import cli, load_quantized, quantize
from tinyq_lightning.table import Table, format_bytes

WIDTH, DEPTH = 4096, 12
TASKS = {
    "in_place": "`quantize(model)` in place: peak above the float model",
    "kept": "quantized model after its first forward pass: all that it keeps",
    "file": "`tinyq-lightning quantize`, file to file: peak above an idle process",
    "load": "`load_quantized`: peak above an idle process",
}


class Wide(LightningModule):
    def __init__(self, width: int, depth: int):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


def resident(key: str) -> int:
    """Bytes: ``VmRSS`` now, ``VmHWM`` at the peak since the process began."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def work(task: str, folder: Path, method: str, width: int, depth: int) -> tuple[int, int]:
    """Resident bytes before a task and, at its peak or its end, after it."""
    torch.set_num_threads(1)
    warm = nn.Sequential(nn.Linear(width, 64))
    quantize(warm, method)
    warm(torch.randn(1, width))  # what the first product of a process brings with it is not the model's
    before = resident("VmRSS")
    if task == "file":
        arguments = ["quantize", str(folder / "float.ckpt"), "--model", "memory:Wide", "--method", method, "--json"]
        cli.main([*arguments, "--output", str(folder / "int8.ckpt")])
    elif task == "load":
        load_quantized(folder / "int8.ckpt", Wide)
    else:
        model = Wide(width, depth)
        if task == "in_place":
            before = resident("VmRSS")
        quantize(model, method)
        if task == "kept":
            model.layers(torch.randn(1, width))
            gc.collect()
    return before, resident("VmRSS" if task == "kept" else "VmHWM")


def measure(args: argparse.Namespace) -> list[dict]:
    width, depth = (512, 4) if args.quick else (WIDTH, DEPTH)
    float_bytes = depth * (width * width + width) * 4
    cells: list[dict] = []
    if not Path("/proc/self/status").exists():
        return [{"part": "memory", "contender": "memory", "failed": "it reads /proc, which only Linux has"}]
    with tempfile.TemporaryDirectory() as folder:
        content = {"state_dict": Wide(width, depth).state_dict(), "hyper_parameters": {"width": width, "depth": depth}}
        content |= {"pytorch-lightning_version": "2.6.6", "epoch": 0, "global_step": 0}
        torch.save(content, Path(folder, "float.ckpt"))
        del content
        for task in TASKS:
            command = [sys.executable, "-W", "ignore", __file__, task, folder, "w8a32", str(width), str(depth)]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parent)
            before, after = map(int, run.stdout.splitlines()[-1].split())
            place = {"part": "memory", "task": task, "float_bytes": float_bytes, "before": before, "after": after}
            cells.append({**place, "share": (after - before) / float_bytes})
            print(f"memory {task}: {cells[-1]['share']:.3f} of the float weights", file=sys.stderr, flush=True)
    return cells


def table(cells: list[dict]) -> tuple[str, Table]:
    title = f"Resident memory, as a share of {format_bytes(cells[0]['float_bytes'])} of float32 weights"
    return title, Table(["", "share"], [[TASKS[cell["task"]], f"{cell['share']:.3f}"] for cell in cells])


if __name__ == "__main__":
    print(*work(sys.argv[1], Path(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:])))
