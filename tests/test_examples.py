"""Every example runs as a user runs it, in a process of its own."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(folder, *command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [sys.executable, "-W", "ignore", *map(str, command)]
    done = subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """What examples/digits.py printed, and where it left its files."""
    root = tmp_path_factory.mktemp("digits")
    return run(root, ROOT / "examples" / "digits.py", "--epochs", 2, "--root", root), root


def test_digits_ends_with_the_table_and_a_reloaded_model_of_the_same_score(digits):
    shown, root = digits
    for text in (
        "val_acc",
        "file on disk",
        "float      ",
        "quantized  ",
        "% of the weight bytes in int8 (w8a32), 6 of 6 layers",
    ):
        assert text in shown
    assert shown.count("the same") == 2
    assert "DIFFERENT" not in shown
    in_memory, reloaded = (
        line.split("test_acc")[1] for line in shown.splitlines() if line.startswith("w8a32, ") and "test_acc" in line
    )
    assert in_memory == reloaded
    assert len(list(root.rglob("w8a32-*.ckpt"))) == 1


def outline(line: str) -> str:
    """A line without what another processor, torch or number of epochs changes: figures, kernels and times."""
    line = re.sub(r"(float32 to [\d,]+ rows, )?(int8|float32) (?= *\d\d\.\d )", "", line)
    line = re.sub(r"[-+−]?\d[\d.,]*(e-\d+)?%?", "#", line).replace("±", "")
    return " ".join(re.sub("─+", "─", line).split())


def test_the_readme_shows_what_the_example_prints(digits):
    page = (ROOT / "README.md").read_text().partition("`make demo` ends with this")[2]
    shown = page.partition("```\n")[2].partition("```\n")[0].replace("runs/digits/", "")
    printed = {outline(line.replace(f"{digits[1]}/", "")) for line in digits[0].splitlines()}
    machine = ("kernel ", "in memory, ", "ms per batch", "layer ")  # of which the first has no kernels elsewhere
    lines = [line for line in shown.splitlines() if not line.startswith(machine) and "─" not in line]
    assert len(lines) > 20
    assert [line for line in lines if outline(line) not in printed] == []


@pytest.mark.slow
def test_a_resnet_of_digits_ends_with_int8_convolutions_of_nearly_the_same_score(tmp_path):
    shown = run(tmp_path, ROOT / "examples" / "digits_resnet.py", "--epochs", 6, "--root", tmp_path)
    assert "w8a32: 99.4 % of the weight bytes in int8 (w8a32), 11 of 11 layers" in shown
    float_, int8 = (
        float(line.split()[line.split().index("test_acc") + 1]) for line in shown.splitlines() if " test_acc " in line
    )
    assert float_ > 0.8
    assert int8 > float_ - 0.01
    assert len(list(tmp_path.rglob("w8a8-*.ckpt"))) == 1


@pytest.mark.parametrize("spec", ["w8a8", "configs/mixed.yaml"])
def test_evaluate_checkpoint_takes_a_float_file(digits, spec):
    path = next(path for path in digits[1].rglob("epoch*.ckpt"))
    spec = ROOT / spec if spec.endswith(".yaml") else spec
    shown = run(digits[1], ROOT / "examples" / "evaluate_checkpoint.py", path, "--spec", spec)
    assert "test_acc" in shown
    assert "SQNR dB" in shown


def test_budget_wins_back_what_int8_costs(tmp_path):
    shown = run(tmp_path, ROOT / "examples" / "budget.py", "--epochs", 4, "--root", tmp_path)
    assert "budget met: val_acc loses " in shown
    assert "(of 6 layers 1 float, " in shown
    lines = [line.split() for line in shown.splitlines() if " test_acc " in line]
    float_, everywhere, within = (float(line[line.index("test_acc") + 1]) for line in lines)
    assert everywhere < float_ - 0.005, "int8 everywhere costs real accuracy"
    assert within > everywhere
    assert len(list((tmp_path / "0").glob("w8a8-epoch=*.html"))) == 1


def test_a_forecaster_of_lstm_layers_is_a_quarter_and_as_good(tmp_path):
    shown = run(tmp_path, ROOT / "examples" / "forecasting.py", "--epochs", 4, "--root", tmp_path)
    assert "100 % of the weight bytes in int8 (w8a32), 2 of 2 layers" in shown
    assert "recurrent  w8a32" in shown
    *_, before, after, _ = next(line for line in shown.splitlines() if line.startswith("val_mae ")).split()
    assert float(after) == pytest.approx(float(before), rel=0.003)
    reloaded, naive = map(float, re.findall(r"\d+\.\d+", shown.splitlines()[-1]))
    assert reloaded == pytest.approx(float(after), rel=1e-4)
    assert reloaded < 0.8 * naive


def test_the_cli_experiment_quantizes_what_its_yaml_says(tmp_path):
    config = ROOT / "configs" / "digits_cli.yaml"
    shown = run(tmp_path, ROOT / "examples" / "digits_cli.py", "fit", "--config", config, "--trainer.max_epochs", 2)
    assert "% of the weight bytes in int8 (w8a32), 5 of 6 layers" in shown
    assert len(list((tmp_path / "runs").rglob("w8a32-*.ckpt"))) == 1


def test_the_cli_help_explains_the_callback(tmp_path):
    shown = run(
        tmp_path,
        ROOT / "examples" / "digits_cli.py",
        "fit",
        "--trainer.callbacks.help",
        "tinyq_lightning.TinyQCallback",
    )
    assert "patterns of layers to leave float" in " ".join(shown.split())


BENCHED = {  # part of examples/bench: what it cannot do without
    "layers": {"float32", "w8a32", "w8a16", "w8a8", "bfloat16", "w8a16-bfloat16"},
    "chain": {"float32", "w8a32"},
    "four_bits": {"w8a32 again", "w4a32", "w4a8", "w4a32, kernel: compact"},
    "recurrent": {"float32", "w8a32", "w8a32, kernel: int8", "bfloat16"},
    "lookups": {"float32", "w8a32", "bfloat16"},
    "convolutions": {"float32", "w8a32", "w8a16", "w8a8"},
    "text_encoder": {"float32", "w8a32", "w8a16", "w8a8"},
    "handover": {"float32", "float32 onnx", "onnx w8a8"},
    "memory": {"in_place", "kept", "file", "file_w4", "load"},
    "quantizing": {"memcpy", "quantize_per_row(weight)", "quantize(model)"},
}
LONG = ("four_bits", "text_encoder", "handover", "memory")


def bench(folder, *arguments):
    shown = run(folder, ROOT / "examples" / "bench", "--quick", "--json", folder / "bench.json", *arguments)
    return shown, json.loads((folder / "bench.json").read_text())


@pytest.mark.parametrize(
    "part",
    [pytest.param(p, marks=pytest.mark.slow) if p in LONG else p for p in BENCHED],
)
def test_bench_tells_of_each_contender_a_figure_or_why_it_has_none(tmp_path, part):
    shown, written = bench(tmp_path, "--parts", part, "--markdown")
    assert {"processor", "capability", "VNNI", "threads", "load", "torch", "torchao"} <= set(written["machine"])
    assert f"torch {written['machine']['torch']}" in shown.splitlines()[0]
    cells = written["cells"]
    assert {cell["part"] for cell in cells} == {part}
    for cell in cells:
        figures = [cell[name] for name in ("seconds", "ratio", "share", "gb_per_second") if name in cell]
        assert ("failed" in cell) != bool(figures), cell
        assert all(math.isfinite(value) for value in figures)
        assert cell.get("spread", 0) >= 0
    done = {cell["contender"] for cell in cells if "failed" not in cell}
    assert BENCHED[part] <= done
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(done)
    assert len({line.count("|") for line in lines}) == 1


def test_bench_measures_errors_against_what_each_layer_is_meant_to_compute(tmp_path):
    chosen = ("w8a32", "w8a16", "w8a8", "w8a16-bfloat16")
    _, written = bench(tmp_path, "--parts", "layers", "--threads", 1, 2, "--contenders", *chosen)
    cells = written["cells"]
    assert {cell["contender"]: cell["over"] for cell in cells} == {
        **dict.fromkeys(("float32", "w8a32", "w8a16", "w8a8", "bfloat16"), "float32"),
        "w8a16-bfloat16": "bfloat16",
    }
    assert {cell["column"] for cell in cells} == {"small, 1 thread", "small, 2 threads"}
    bounds = {"float32": 1e-6, "w8a32": 1e-6, "w8a16": 1e-4, "w8a8": 2e-2, "bfloat16": 1e-2, "w8a16-bfloat16": 1e-2}
    for cell in cells:
        assert 0 < cell["error"] < bounds[cell["contender"]], cell


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path):
    limit = 80 if path.parent.name == "examples" else 110  # those of a folder are programs of several files
    assert len(path.read_text().splitlines()) <= limit


def test_a_table_is_quantized_within_its_budget(tmp_path):
    shown = run(tmp_path, ROOT / "examples" / "tabular.py", "--epochs", 4, "--root", tmp_path)
    assert "budget met: val_auroc " in shown
    again = shown.split("reloaded int8 file ")[1].split()[0]
    assert float(again) > 0.9
    assert len(list(tmp_path.glob("w8a8-epoch=*.ckpt"))) == 1


@pytest.mark.slow
def test_a_tied_transformer_writes_letters_by_three_methods(tmp_path):
    shown = run(tmp_path, ROOT / "examples" / "text.py", "--epochs", 3, "--root", tmp_path)
    bits = float(shown.split("'val_bits_per_letter': ")[1].split("}")[0])
    assert 2 < bits < 4.9, "better than chance among the letters of a text"
    assert {path.name.split("-")[0] for path in tmp_path.glob("w8*.ckpt")} == {"w8a32", "w8a16", "w8a8"}
