"""Peak resident memory of quantizing a file and of loading the result, for twelve Linear layers of 4096×4096.

python examples/bench_memory.py [--json]

Each is run in a process of its own, and what an idle one of the same imports takes is subtracted.
Needs 2 GB of memory and of disk for a moment. Linux only: it reads /proc.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import nn

WIDTH, DEPTH = 4096, 12
FLOAT_BYTES = DEPTH * (WIDTH * WIDTH + WIDTH) * 4


class Wide(LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))


def work(task: str, folder: Path) -> None:
    """One measured process: the command or the call, then its peak in bytes."""
    from tinyq_lightning import cli, file_commands, load_quantized

    arguments = ["quantize", str(folder / "float.ckpt"), "--model", "bench_memory:Wide", "--json"]
    if task == "quantize":
        cli.main([*arguments, "--output", str(folder / "int8.ckpt")])
    elif task == "load":
        load_quantized(folder / "int8.ckpt", Wide)
    else:
        assert callable(file_commands.quantize)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) * 1024)


def measured(task: str, folder: str) -> int:
    command = [sys.executable, "-W", "ignore", __file__, "--task", task, "--folder", folder]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    return int(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        return work(args.task, Path(args.folder))

    with tempfile.TemporaryDirectory() as folder:
        content = {
            "state_dict": Wide().state_dict(),
            "pytorch-lightning_version": "2.6.6",
            "epoch": 0,
            "global_step": 0,
        }
        torch.save(content, Path(folder, "float.ckpt"))
        idle = measured("idle", folder)
        share = {task: (measured(task, folder) - idle) / FLOAT_BYTES for task in ("quantize", "load")}
    if args.json:
        print(json.dumps(share))
    else:
        print(f"float weights {FLOAT_BYTES / 1e6:.0f} MB, an idle process {idle / 1e6:.0f} MB. Peak above that:")
        print(f"tinyq-lightning quantize  {share['quantize']:.2f} of the float weights")
        print(f"load_quantized            {share['load']:.2f} of the float weights")
    return None


if __name__ == "__main__":
    main()
