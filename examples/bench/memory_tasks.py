"""Resident memory of one task, measured in the process that this file is run as: ``memory`` runs it.

python memory_tasks.py in_memory|quantize_file|load_file|quantize_four_bits FOLDER WIDTH DEPTH

Prints, as JSON, the bytes before and after (at the peak, but for what is kept) by the name of each figure.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from torch import nn

from tinyq_lightning import quantize


def resident(key: str) -> int:
    """Bytes: ``VmRSS`` now, ``VmHWM`` at the peak since the process began."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def in_memory(folder: Path, width: int, depth: int) -> dict[str, tuple[int, int]]:
    # No warm-up: what it left free in the heap would hide as much of what comes.
    before = resident("VmRSS")
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
    float_model = resident("VmRSS")
    quantize(model)
    peak = resident("VmHWM")
    model(torch.randn(1, width))
    gc.collect()
    return {"in_place": (float_model, peak), "kept": (before, resident("VmRSS"))}


def quantize_file(folder: Path, *_: int, method: str = "w8a32") -> dict[str, tuple[int, int]]:
    import wide  # noqa: F401  # what is imported anyhow comes before the command

    from tinyq_lightning.command import file_commands, main  # noqa: F401

    before = resident("VmRSS")
    arguments = ["quantize", str(folder / "float.ckpt"), "--model", "wide:Wide", "--method", method, "--json"]
    main([*arguments, "--output", str(folder / f"{method}.ckpt")])
    return {"file": (before, resident("VmHWM"))}


def quantize_four_bits(folder: Path, *_: int) -> dict[str, tuple[int, int]]:
    return {"file_w4": quantize_file(folder, method="w4a32")["file"]}


def load_file(folder: Path, width: int, depth: int) -> dict[str, tuple[int, int]]:
    from wide import Wide

    from tinyq_lightning import load_quantized

    before = resident("VmRSS")
    load_quantized(folder / "w8a32.ckpt", Wide)
    return {"load": (before, resident("VmHWM"))}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]), *map(int, sys.argv[3:]))))
