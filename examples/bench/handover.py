"""The text encoder exported in each format, beside float32 in the same runtime: size, speed, error and memory."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from handover_files import EXPORTS, written
from handover_task import OPEN
from summary import show
from text_encoder import SHAPES, load
from timing import compare

from tinyq_lightning.table import Table


@torch.no_grad()
def measure(args: argparse.Namespace) -> list[dict]:
    try:
        encoder, words = load()
    except ModuleNotFoundError as error:
        failed = f"{error.name} is not installed, see examples/real_models/wheels.py"
        return [{"part": "handover", "contender": "text_encoder", "failed": failed}]
    with tempfile.TemporaryDirectory() as folder:
        exports = EXPORTS[2:3] if args.quick else EXPORTS
        files, cells = written(encoder, words[: 2 * 64].view(2, 64), Path(folder), exports)
        held = {name: _resident(kind, path) for name, (kind, path) in files.items()}
        calls = {"float32": encoder} | {name: OPEN[kind](str(path)) for name, (kind, path) in files.items()}
        over = {name: f"float32 {kind}" for name, (kind, _) in files.items() if f"float32 {kind}" in files}
        for batch, tokens in SHAPES[: 1 if args.quick else None]:
            ids = words[: batch * tokens].view(batch, tokens)
            wanted = encoder(ids).double()
            runs = {name: lambda run=run, ids=ids: run(ids) for name, run in calls.items()}
            here = compare(runs, dict.fromkeys(runs, wanted), over, args, dict.fromkeys(runs, ""))
            show(f"handover {batch} × {tokens}", here)
            cells += [{"part": "handover", "column": f"{batch} × {tokens}", **_of(cell, files, held)} for cell in here]
    return cells


def _resident(kind: str, path: Path) -> int:
    """Bytes that a process holds more once it has loaded a file and run it."""
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name("handover_task.py"), kind, path]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def _of(cell: dict, files: dict, held: dict) -> dict:
    kind, path = files.get(cell["contender"], ("", None))
    if path is None:
        return cell
    parts = {path, path.with_suffix(".bin")} if path.suffix == ".xml" else {path}
    size = sum(each.stat().st_size for each in parts)
    return cell | {"kind": kind, "bytes": size, "resident": held[cell["contender"]]}


def table(cells: list[dict]) -> tuple[str, Table]:
    done = [cell for cell in cells if "ratio" in cell]
    columns = list(dict.fromkeys(cell["column"] for cell in done))
    rows = []
    for name in dict.fromkeys(cell["contender"] for cell in done):
        own = {cell["column"]: cell for cell in done if cell["contender"] == name}
        first = own[columns[0]]
        figures = [f"{own[column]['ratio']:.2f}" if column in own else "–" for column in columns]
        error = max(cell["error"] for cell in own.values())
        size, held = (f"{first[key] / 1e6:.1f}" if key in first else "–" for key in ("bytes", "resident"))
        rows.append([name, size, *figures, f"{error:.3f}", held])
    title = (
        "MiniLM text encoder exported, batch × tokens: time of float32 in the same runtime (of eager float32 for files "
        "that torch runs) / time; error of the hidden states against float32; MB resident once it has run"
    )
    return title, Table(["", "MB", *columns, "error", "MB resident"], rows)
